#pragma once

#include <cstdint>

#include "isa.h"

namespace sdft {

// out (tokens, vocabulary) = hidden (tokens, size) weight (vocabulary, size)^T, rows `*_stride` elements apart.
struct LogitsGemm {
  const void* hidden;
  const void* weight;
  float* out;
  int64_t tokens, vocabulary, size;
  int64_t hidden_stride, weight_stride, out_stride;
  bool bf16;   // hidden and weight, else fp32
  bool pairs;  // multiply bf16 by VDPBF16PS; only where isa() is avx512_bf16
};

// Long sums are cut into blocks of equal size, at most this many words (fp32 numbers, or pairs of bf16).
constexpr int64_t K_BLOCK = 768;
// Vocabulary rows packed at a time for one K block, at most: 576 KiB, of the 1 MiB or more of L2 beside AVX-512.
constexpr int64_t GROUP_COLUMNS = 192;
// Where parts of the vocabulary may begin: a whole tile of every build.
constexpr int64_t COLUMN_UNIT = 48;
// What a thread needs: the packed group and a tile's rows of hidden.
constexpr int64_t LOGITS_SCRATCH_FLOATS = (GROUP_COLUMNS + 8) * K_BLOCK;

}  // namespace sdft

// Computes the columns [begin, end) of `gemm.out`; `scratch` holds LOGITS_SCRATCH_FLOATS, on a 64-byte boundary.
SDFT_DECLARE(void logits_gemm(const LogitsGemm& gemm, int64_t begin, int64_t end, float* scratch))
