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

// A group of vocabulary rows packed for K_BLOCK words of the sum takes 480 KiB: half of the smallest L2 cache (1 MiB)
// of the processors with AVX-512. 240 columns are whole tiles of every build (48, 16 and 8 columns).
constexpr int64_t GROUP_COLUMNS = 240;
constexpr int64_t K_BLOCK = 512;
// Where parts of the vocabulary may begin: a whole tile of every build.
constexpr int64_t COLUMN_UNIT = 48;
// What a thread needs: the packed group and a tile's rows of hidden.
constexpr int64_t LOGITS_SCRATCH_FLOATS = (GROUP_COLUMNS + 8) * K_BLOCK;

}  // namespace sdft

// Computes the columns [begin, end) of `gemm.out`; `scratch` holds LOGITS_SCRATCH_FLOATS, on a 64-byte boundary.
SDFT_DECLARE(void logits_gemm(const LogitsGemm& gemm, int64_t begin, int64_t end, float* scratch))
