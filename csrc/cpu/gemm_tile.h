#pragma once

#include "lanes_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The register tile of our matrix products, and the transposition that packs their operands.
// Only for files that CMake compiles once per instruction set.
namespace sdft::SDFT_ISA {

// A tile's sums, one row of its right operand and one broadcast fill the 32, 16 and 16 vector registers.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;

// VDPBF16PS is not among this build's flags: isa() decides at run time whether code that holds it is entered. A tile
// carries the attribute whatever its product; no compiler may turn an fp32 product into a bf16 one.
#if defined(__AVX512F__)
#define SDFT_TARGET_BF16 __attribute__((target("avx512bf16")))
#else
#define SDFT_TARGET_BF16
#endif
#define SDFT_ALWAYS_INLINE inline __attribute__((always_inline))

// A 32-bit word in every lane. By integers: pairs of bf16 read as fp32 may be signalling NaNs, which must keep their
// bits.
static SDFT_ALWAYS_INLINE vfloat splat(const float* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return bits_as<vfloat>(vint{} + word);
}

// sum + left * right, one fp32 number a word.
struct Fp32Product {
  static SDFT_TARGET_BF16 SDFT_ALWAYS_INLINE vfloat add(vfloat left, vfloat right, vfloat sum) {
    return fused(left, right, sum);
  }
};

#if defined(__AVX512F__)
// sum + left0 * right0 + left1 * right1, two bf16 numbers a word: VDPBF16PS, which takes denormals for zeros.
struct Bf16PairProduct {
  static SDFT_TARGET_BF16 SDFT_ALWAYS_INLINE vfloat add(vfloat left, vfloat right, vfloat sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// sum[i, j] += a[i * row_step + k * step] * b[k * b_step + j], over k in order.
template <class Product, int ROWS, int VECTORS>
SDFT_TARGET_BF16 SDFT_ALWAYS_INLINE void add_products(const float* a, int64_t row_step, int64_t step, const float* b,
                                                      int64_t b_step, int64_t steps, vfloat (&sum)[ROWS][VECTORS]) {
  for (int64_t k = 0; k < steps; ++k) {
    vfloat right[VECTORS];
    for (int j = 0; j < VECTORS; ++j) {
      right[j] = load(b + k * b_step + j * LANES);
    }
    for (int i = 0; i < ROWS; ++i) {
      const vfloat left = splat(a + i * row_step + k * step);
      for (int j = 0; j < VECTORS; ++j) {
        sum[i][j] = Product::add(left, right[j], sum[i][j]);
      }
    }
  }
}

// out[i, j] = (or, with `add`, +=) sum over k of a[i * row_step + k * STEP] * b[k * TILE_COLUMNS + j], for i in ROWS
// and j in `columns` <= TILE_COLUMNS. Each sum runs over k in order, by itself, so it is the same whatever ROWS is.
template <class Product, int ROWS, int STEP>
SDFT_TARGET_BF16 static void tile(const float* a, int64_t row_step, const float* b, int64_t steps, bool add, float* out,
                                  int64_t out_stride, int64_t columns) {
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < TILE_COLUMNS; j += 16) {
      __builtin_prefetch(out + i * out_stride + j, 1);
    }
  }
  vfloat sum[ROWS][TILE_VECTORS] = {};
  add_products<Product>(a, row_step, STEP, b, TILE_COLUMNS, steps, sum);
  // Apart from the ragged case, so that the sums never leave the registers.
  if (columns >= TILE_COLUMNS) {
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < TILE_VECTORS; ++j) {
        float* to = out + i * out_stride + j * LANES;
        store(to, add ? load(to) + sum[i][j] : sum[i][j]);
      }
    }
    return;
  }
  float values[ROWS][TILE_COLUMNS];
  std::memcpy(values, sum, sizeof(values));
  for (int i = 0; i < ROWS; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float* to = out + i * out_stride + j;
      *to = add ? *to + values[i][j] : values[i][j];
    }
  }
}

// `tile` for `rows` <= ROWS.
template <class Product, int ROWS, int STEP>
static void ragged_tile(int64_t rows, const float* a, int64_t row_step, const float* b, int64_t steps, bool add,
                        float* out, int64_t out_stride, int64_t columns) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return ragged_tile<Product, ROWS - 1, STEP>(rows, a, row_step, b, steps, add, out, out_stride, columns);
    }
  }
  tile<Product, ROWS, STEP>(a, row_step, b, steps, add, out, out_stride, columns);
}

// out[i, j] += (or, with ADD false, =) sum over k of a(i, k) b[k * b_step + j], for i in ROWS and j in VECTORS vectors,
// where a(i, k) is a[i * a_step + k], or with COLUMNS a[k * a_step + i]. As `tile`, of operands that are not packed.
template <bool COLUMNS, bool ADD, int ROWS, int VECTORS>
SDFT_TARGET_BF16 static void strided_tile(int64_t rows, const float* a, int64_t a_step, const float* b, int64_t b_step,
                                          int64_t steps, float* out, int64_t out_step) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return strided_tile<COLUMNS, ADD, ROWS - 1, VECTORS>(rows, a, a_step, b, b_step, steps, out, out_step);
    }
  }
  vfloat sum[ROWS][VECTORS] = {};
  add_products<Fp32Product>(a, COLUMNS ? 1 : a_step, COLUMNS ? a_step : 1, b, b_step, steps, sum);
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < VECTORS; ++j) {
      float* to = out + i * out_step + j * LANES;
      store(to, ADD ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// low = a0 b0 a1 b1 ..., high goes on where low ends.
static SDFT_ALWAYS_INLINE void interleave(vfloat a, vfloat b, vfloat& low, vfloat& high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, second, b);
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
#elif defined(__x86_64__)
  low = _mm_unpacklo_ps(a, b);
  high = _mm_unpackhi_ps(a, b);
#else
  for (int lane = 0; lane < LANES / 2; ++lane) {
    low[2 * lane] = a[lane];
    low[2 * lane + 1] = b[lane];
    high[2 * lane] = a[LANES / 2 + lane];
    high[2 * lane + 1] = b[LANES / 2 + lane];
  }
#endif
}

// Rows to columns, in place: each of log2(LANES) perfect shuffles moves one bit of the row's number into the lane's.
static SDFT_ALWAYS_INLINE void transpose(vfloat (&rows)[LANES]) {
  for (int stage = 1; stage < LANES; stage *= 2) {
    vfloat next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      interleave(rows[i], rows[i + LANES / 2], next[2 * i], next[2 * i + 1]);
    }
    for (int i = 0; i < LANES; ++i) {
      rows[i] = next[i];
    }
  }
}

}  // namespace sdft::SDFT_ISA
