#include "weight_grad_gemm.h"

#include "bfloat16.h"
#include "gemm_tile.h"

#if defined(__AVX512F__)
namespace sdft::SDFT_ISA {
namespace {

static_assert(HIDDEN_PANEL == TILE_COLUMNS && VOCABULARY_PANEL % LANES == 0 && LANES % TILE_ROWS == 0, "whole tiles");

constexpr int64_t PAIRS = TOKEN_BLOCK / 2;

// LANES bf16 numbers of a row, zeros after `count`.
vbfloat16 numbers(const uint16_t* from, int64_t count) {
  vbfloat16 values = {};
  if (count >= LANES) {
    std::memcpy(&values, from, sizeof(values));
    return values;
  }
  uint16_t part[LANES] = {};
  for (int64_t i = 0; i < count; ++i) {
    part[i] = from[i];
  }
  std::memcpy(&values, part, sizeof(values));
  return values;
}

// to[k * step + lane] = (rows 2k and 2k + 1)[lane] for the pairs of `tokens` rows; a last odd row is paired with zeros.
void pack_pairs(const uint16_t* rows, int64_t stride, int64_t tokens, int64_t columns, float* to, int64_t step) {
  for (int64_t k = 0; 2 * k < tokens; ++k) {
    // The rows are too far apart for the processor to see a stream: two lines ahead, a whole pass over the tokens.
    __builtin_prefetch(rows + 2 * k * stride + 64, 0, 2);
    __builtin_prefetch(rows + (2 * k + 1) * stride + 64, 0, 2);
    const vbfloat16 even = numbers(rows + 2 * k * stride, columns);
    const vbfloat16 odd = 2 * k + 1 < tokens ? numbers(rows + (2 * k + 1) * stride, columns) : vbfloat16{};
    const vuint words = bits_as<vuint>(widen(even)) >> 16 | bits_as<vuint>(widen(odd));
    std::memcpy(to + k * step, &words, sizeof(words));
  }
}

}  // namespace

void pack_hidden(const WeightGradGemm& g, int64_t token, int64_t count, int64_t begin, int64_t end, float* packed) {
  const uint16_t* hidden = g.hidden + token * g.hidden_stride;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t j = 0; j < HIDDEN_PANEL; j += LANES) {
      const int64_t at = panel * HIDDEN_PANEL + j;
      if (at < g.size) {
        pack_pairs(hidden + at, g.hidden_stride, count, g.size - at, packed + panel * HIDDEN_PANEL_FLOATS + j,
                   HIDDEN_PANEL);
      }
    }
  }
}

void add_weight_grad(const WeightGradGemm& g, int64_t token, int64_t count, int64_t begin, int64_t end,
                     const float* packed, float* scratch) {
  const uint16_t* grad = g.grad + token * g.grad_stride;
  for (int64_t first = begin; first < end; first += VOCABULARY_PANEL) {
    const int64_t rows = end - first < VOCABULARY_PANEL ? end - first : VOCABULARY_PANEL;
    for (int64_t row = 0; row < rows; row += LANES) {
      pack_pairs(grad + first + row, g.grad_stride, count, rows - row, scratch + row * PAIRS, LANES);
    }
    for (int64_t column = 0; column < g.size; column += TILE_COLUMNS) {
      const float* panel = packed + column / HIDDEN_PANEL * HIDDEN_PANEL_FLOATS;
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        const float* left = scratch + row / LANES * LANES * PAIRS + row % LANES;
        float* total = g.total + (first + row) * g.total_stride + column;
        ragged_tile<Bf16PairProduct, TILE_ROWS, LANES>(rows - row, left, 1, panel, (count + 1) / 2, true, total,
                                                       g.total_stride, g.size - column);
      }
    }
  }
}

}  // namespace sdft::SDFT_ISA
#endif
