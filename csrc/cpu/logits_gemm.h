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
  bool few;    // tokens: read the weight as it lies, do not pack it

  // Of a sum, as the tiles see it.
  int64_t words() const { return pairs ? (size + 1) / 2 : size; }
};

// Long sums are cut into blocks of equal size, at most this many words (fp32 numbers, or pairs of bf16).
constexpr int64_t K_BLOCK = 768;
// Vocabulary rows packed at a time for one K block, at most: 576 KiB, of the 1 MiB or more of L2 beside AVX-512.
constexpr int64_t GROUP_COLUMNS = 192;
// Where parts of the vocabulary may begin: a whole tile of every build.
constexpr int64_t COLUMN_UNIT = 48;

// Words of a K block for sums of `words` in all: in as few blocks as K_BLOCK allows, whole vectors of every build.
constexpr int64_t block_words(int64_t words) {
  const int64_t blocks = words > K_BLOCK ? (words + K_BLOCK - 1) / K_BLOCK : 1;
  return ((words + blocks - 1) / blocks + 15) / 16 * 16;
}

// What a thread needs: the packed group and a tile's rows of hidden. At most 600 KiB.
constexpr int64_t logits_scratch_floats(int64_t words) { return (GROUP_COLUMNS + 8) * block_words(words); }

}  // namespace sdft

// Computes the columns [begin, end) of `gemm.out`; `scratch` holds logits_scratch_floats(words()), on
// a 64-byte boundary.
SDFT_DECLARE(void logits_gemm(const LogitsGemm& gemm, int64_t begin, int64_t end, float* scratch))
