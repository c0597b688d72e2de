#include "logits_gemm.h"

#include "bfloat16.h"
#include "gemm_tile.h"

namespace sdft::SDFT_ISA {
namespace {

// 192, 64 and 32 columns: 576 KiB where there is AVX-512, 192 KiB for the smaller L2 caches of AVX2 processors.
constexpr int64_t GROUP = 4 * TILE_COLUMNS;
static_assert(GROUP <= GROUP_COLUMNS && COLUMN_UNIT % TILE_COLUMNS == 0, "parts of the vocabulary are tiles");
static_assert(16 % LANES == 0 && TILE_ROWS <= 8, "the scratch holds whole vectors");

// How one operand's row becomes LANES words of a tile: `full` reads LANES * PER_WORD elements. IN_MEMORY: they lie
// there word by word.
struct Fp32Words {
  using element = float;
  static constexpr int64_t PER_WORD = 1;
  static constexpr bool IN_MEMORY = true;
  static vfloat full(const float* from) { return load(from); }
};

struct WidenedBf16Words {
  using element = uint16_t;
  static constexpr int64_t PER_WORD = 1;
  static constexpr bool IN_MEMORY = false;
  static vfloat full(const uint16_t* from) {
    vbfloat16 value;
    std::memcpy(&value, from, sizeof(value));
    return widen(value);
  }
};

struct Bf16PairWords {
  using element = uint16_t;
  static constexpr int64_t PER_WORD = 2;
  static constexpr bool IN_MEMORY = true;
  static vfloat full(const uint16_t* from) {
    vfloat value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
};

// LANES words from the `count` elements that are left of a row; zeros after them. Nothing beyond the row is read: what
// lies there may be a NaN, or another's memory.
template <class Words>
vfloat words(const typename Words::element* from, int64_t count) {
  if (count >= LANES * Words::PER_WORD) {
    return Words::full(from);
  }
  typename Words::element part[LANES * Words::PER_WORD] = {};
  for (int64_t i = 0; i < count; ++i) {
    part[i] = from[i];
  }
  return Words::full(part);
}

// panel[k, j] = word k of row j, for `columns` <= TILE_COLUMNS rows of the weight and `count` elements of each.
template <class Words>
void pack_panel(const typename Words::element* weight, int64_t stride, int64_t columns, int64_t count, float* panel) {
  for (int64_t j = 0; j < TILE_COLUMNS; j += LANES) {
    for (int64_t k = 0; k * Words::PER_WORD < count; k += LANES) {
      vfloat rows[LANES];
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t at = k * Words::PER_WORD;
        // The weight comes from memory, 16 streams at a time, more than the processor follows by itself: 32 rows ahead
        // makes 62 GFLOP/s of 45 in fp32 and 128 of 80 in bf16 at 16 tokens. A prefetch beyond the weight does nothing.
        __builtin_prefetch(weight + (j + i + 2 * LANES) * stride + at, 0, 2);
        rows[i] = j + i < columns ? words<Words>(weight + (j + i) * stride + at, count - at) : vfloat{};
      }
      transpose(rows);
      for (int64_t i = 0; i < LANES; ++i) {
        store(panel + (k + i) * TILE_COLUMNS + j, rows[i]);
      }
    }
  }
}

// to[i * pitch + k] = word k of row i.
template <class Words>
void copy_rows(const typename Words::element* from, int64_t stride, int64_t rows, int64_t count, float* to,
               int64_t pitch) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k * Words::PER_WORD < count; k += LANES) {
      const int64_t at = k * Words::PER_WORD;
      store(to + i * pitch + k, words<Words>(from + i * stride + at, count - at));
    }
  }
}

// One K block, `count` elements from `at` on, of the columns [begin, begin + columns), columns <= GROUP. A row of the
// scratch takes `pitch` words.
template <class Words, class Product>
void group(const LogitsGemm& g, int64_t begin, int64_t columns, int64_t at, int64_t count, int64_t pitch,
           float* scratch) {
  using element = typename Words::element;
  const auto* hidden = static_cast<const element*>(g.hidden) + at;
  const auto* weight = static_cast<const element*>(g.weight) + begin * g.weight_stride + at;
  float* tile_rows = scratch + GROUP_COLUMNS * pitch;
  const int64_t steps = (count + Words::PER_WORD - 1) / Words::PER_WORD;
  for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
    pack_panel<Words>(weight + j * g.weight_stride, g.weight_stride, columns - j, count, scratch + j * pitch);
  }
  // Copying the rows of a tile would cost 4 to 10 % of the whole, since they come from L3: only where their words do
  // not lie in memory as they are.
  const bool direct = Words::IN_MEMORY && count % Words::PER_WORD == 0 && g.hidden_stride % Words::PER_WORD == 0;
  for (int64_t token = 0; token < g.tokens; token += TILE_ROWS) {
    const int64_t rows = g.tokens - token < TILE_ROWS ? g.tokens - token : TILE_ROWS;
    const element* from = hidden + token * g.hidden_stride;
    const float* left = tile_rows;
    int64_t row_step = pitch;
    if (direct) {
      left = reinterpret_cast<const float*>(from);
      row_step = g.hidden_stride / Words::PER_WORD;
    } else {
      copy_rows<Words>(from, g.hidden_stride, rows, count, tile_rows, pitch);
    }
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
      float* out = g.out + token * g.out_stride + begin + j;
      ragged_tile<Product, TILE_ROWS, 1>(rows, left, row_step, scratch + j * pitch, steps, at > 0, out, g.out_stride,
                                         columns - j);
    }
  }
}

// Sums over K blocks: each from zero, then added to `out`, which also keeps long sums accurate. A block without
// elements (size 0) writes the zeros.
template <class Words, class Product>
void all_groups(const LogitsGemm& g, int64_t begin, int64_t end, float* scratch) {
  const int64_t words = block_words(g.words()), block = words * Words::PER_WORD;
  for (int64_t first = begin; first < end; first += GROUP) {
    const int64_t columns = end - first < GROUP ? end - first : GROUP;
    int64_t at = 0;
    do {
      group<Words, Product>(g, first, columns, at, g.size - at < block ? g.size - at : block, words, scratch);
      at += block;
    } while (at < g.size);
  }
}

// Few tokens: packing the weight would take longer than reading it. Its rows stream past as they lie, FEW_ROWS at a
// time; sums are vectors over k, as many as one transposition adds up across their lanes. By hand, 424 MB of weights of
// 576 and 1536 columns, at 8 tokens of fp32: 20 ms, packed 28, only read 14 to 15 (2 threads); at 16 tokens 32 and 33,
// at 32 tokens 62 and 53.
constexpr int FEW_ROWS = 2, FEW_TOKENS = LANES / FEW_ROWS;
// Rows that the prefetch is ahead: 20 ms, not 23 with 2.
constexpr int64_t FEW_AHEAD = 4;

template <class Words, class Product>
SDFT_TARGET_BF16 SDFT_ALWAYS_INLINE void few_tokens_step(const typename Words::element* const (&left)[FEW_TOKENS],
                                                         const typename Words::element* const (&right)[FEW_ROWS],
                                                         int64_t k, int64_t count, vfloat (&sum)[LANES]) {
  vfloat weight[FEW_ROWS];
  for (int j = 0; j < FEW_ROWS; ++j) {
    weight[j] = words<Words>(right[j] + k, count);
  }
  for (int i = 0; i < FEW_TOKENS; ++i) {
    const vfloat hidden = words<Words>(left[i] + k, count);
    for (int j = 0; j < FEW_ROWS; ++j) {
      sum[i * FEW_ROWS + j] = Product::add(hidden, weight[j], sum[i * FEW_ROWS + j]);
    }
  }
}

template <class Words, class Product>
SDFT_TARGET_BF16 void few_tokens_tile(const LogitsGemm& g, int64_t token, int64_t column, int64_t columns, int64_t at,
                                      int64_t count) {
  using element = typename Words::element;
  const int64_t tokens = g.tokens - token < FEW_TOKENS ? g.tokens - token : FEW_TOKENS;
  const int64_t rows = columns < FEW_ROWS ? columns : FEW_ROWS;
  const element *left[FEW_TOKENS], *right[FEW_ROWS];
  // Where there are fewer, the last one again: the time is that of reading the weight.
  for (int i = 0; i < FEW_TOKENS; ++i) {
    left[i] = static_cast<const element*>(g.hidden) + (token + (i < tokens ? i : tokens - 1)) * g.hidden_stride + at;
  }
  for (int j = 0; j < FEW_ROWS; ++j) {
    right[j] = static_cast<const element*>(g.weight) + (column + (j < rows ? j : rows - 1)) * g.weight_stride + at;
  }
  vfloat sum[LANES] = {};
  constexpr int64_t WIDTH = LANES * Words::PER_WORD;
  int64_t k = 0;
  for (; k + WIDTH <= count; k += WIDTH) {
    for (int j = 0; j < FEW_ROWS; ++j) {
      __builtin_prefetch(right[j] + FEW_AHEAD * g.weight_stride + k, 0, 2);
    }
    few_tokens_step<Words, Product>(left, right, k, WIDTH, sum);
  }
  if (k < count) {
    few_tokens_step<Words, Product>(left, right, k, count - k, sum);
  }
  transpose(sum);
  vfloat total = sum[0];
  for (int lane = 1; lane < LANES; ++lane) {
    total += sum[lane];
  }
  for (int i = 0; i < tokens; ++i) {
    for (int j = 0; j < rows; ++j) {
      float* to = g.out + (token + i) * g.out_stride + column + j;
      *to = at > 0 ? *to + total[i * FEW_ROWS + j] : total[i * FEW_ROWS + j];
    }
  }
}

template <class Words, class Product>
void few_tokens(const LogitsGemm& g, int64_t begin, int64_t end) {
  const int64_t block = block_words(g.words()) * Words::PER_WORD;
  for (int64_t column = begin; column < end; column += FEW_ROWS) {
    int64_t at = 0;
    do {
      for (int64_t token = 0; token < g.tokens; token += FEW_TOKENS) {
        few_tokens_tile<Words, Product>(g, token, column, end - column, at, g.size - at < block ? g.size - at : block);
      }
      at += block;
    } while (at < g.size);
  }
}

template <class Words, class Product>
void product(const LogitsGemm& g, int64_t begin, int64_t end, float* scratch) {
  if (g.few) {
    few_tokens<Words, Product>(g, begin, end);
  } else {
    all_groups<Words, Product>(g, begin, end, scratch);
  }
}

}  // namespace

void logits_gemm(const LogitsGemm& gemm, int64_t begin, int64_t end, float* scratch) {
#if defined(__AVX512F__)
  if (gemm.bf16 && gemm.pairs) {
    return product<Bf16PairWords, Bf16PairProduct>(gemm, begin, end, scratch);
  }
#endif
  if (gemm.bf16) {
    return product<WidenedBf16Words, Fp32Product>(gemm, begin, end, scratch);
  }
  product<Fp32Words, Fp32Product>(gemm, begin, end, scratch);
}

}  // namespace sdft::SDFT_ISA
