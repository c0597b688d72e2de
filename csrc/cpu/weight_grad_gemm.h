#pragma once

#include <cstdint>

namespace sdft {

// total (vocabulary, size) += grad (tokens, vocabulary)^T hidden (tokens, size), rows `*_stride` elements apart.
struct WeightGradGemm {
  const uint16_t* grad;  // bits of bf16
  const uint16_t* hidden;
  float* total;
  int64_t tokens, vocabulary, size;
  int64_t grad_stride, hidden_stride, total_stride;
};

// Tokens are summed in blocks, each from zero and then added to `total`: a pass over it every TOKEN_BLOCK tokens.
constexpr int64_t TOKEN_BLOCK = 512;
// hidden is packed in panels of as many columns as a tile has, for all threads; each takes this many floats.
constexpr int64_t HIDDEN_PANEL = 48;
constexpr int64_t HIDDEN_PANEL_FLOATS = TOKEN_BLOCK / 2 * HIDDEN_PANEL;
// A thread packs this many rows of grad^T at a time, 192 KiB of the L2 cache, beside a panel of hidden's 48 KiB.
constexpr int64_t VOCABULARY_PANEL = 192;
constexpr int64_t WEIGHT_GRAD_SCRATCH_FLOATS = TOKEN_BLOCK / 2 * VOCABULARY_PANEL;

}  // namespace sdft

// Only where isa() is avx512_bf16: both sum pairs of tokens, by VDPBF16PS. `count` <= TOKEN_BLOCK tokens from `token`
// on.
namespace sdft::avx512 {

// Packs panels [begin, end) of hidden at `packed`.
void pack_hidden(const WeightGradGemm& gemm, int64_t token, int64_t count, int64_t begin, int64_t end, float* packed);

// Adds to rows [begin, end) of total; `scratch` holds WEIGHT_GRAD_SCRATCH_FLOATS.
void add_weight_grad(const WeightGradGemm& gemm, int64_t token, int64_t count, int64_t begin, int64_t end,
                     const float* packed, float* scratch);

}  // namespace sdft::avx512
