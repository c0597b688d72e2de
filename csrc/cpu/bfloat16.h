#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// bf16 in lanes: an fp32's upper half, so widening is exact and rounding is integer arithmetic on the bits.
// VCVTNEPS2BF16 is not used: it flushes denormals, and every instruction set shall give the same bits. Only for files
// that CMake compiles once per instruction set.
namespace sdft::SDFT_ISA {

using vbfloat16 = uint16_t __attribute__((vector_size(LANE_BYTES / 2)));

constexpr uint32_t BF16_MASK = 0xFFFF0000;
constexpr uint32_t FP32_NAN = 0x7FC00000;

// The two conversions are intrinsics because GCC 12 makes five instructions of the first in AVX-512 and a table lookup
// of the second. With all bits of a mask set, because without a mask it warns of its own header.
static inline vfloat widen(vbfloat16 value) {
#if defined(__AVX512F__)
  const auto words = (vuint)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)value);
#elif defined(__AVX2__)
  const auto words = (vuint)_mm256_cvtepu16_epi32((__m128i)value);
#else
  const auto words = __builtin_convertvector(value, vuint);
#endif
  return bits_as<vfloat>(words << 16);
}

// The upper halves.
static inline vbfloat16 narrow(vfloat value) {
#if defined(__AVX512F__)
  return (vbfloat16)_mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)(bits_as<vuint>(value) >> 16));
#elif defined(__AVX2__)
  const auto words = (__m256i)(bits_as<vuint>(value) >> 16);
  return (vbfloat16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0b1000));
#elif defined(__SSE2__)
  // Sign-extended, so that the signed saturation of the only pack that SSE2 has changes nothing.
  const __m128i words = _mm_srai_epi32((__m128i)bits_as<vuint>(value), 16);
  vbfloat16 halves;
  _mm_storel_epi64((__m128i*)&halves, _mm_packs_epi32(words, words));
  return halves;
#else
  return __builtin_convertvector(bits_as<vuint>(value) >> 16, vbfloat16);
#endif
}

// The nearest bf16, ties to even, as an fp32; for values that are no NaN. What rounds beyond the largest becomes inf.
static inline vfloat round_number_to_bfloat16(vfloat value) {
  const vuint bits = bits_as<vuint>(value);
  return bits_as<vfloat>((bits + 0x7FFFu + ((bits >> 16) & 1u)) & BF16_MASK);
}

// For every value: the increment would carry a NaN of all ones over to -0, so every NaN becomes FP32_NAN.
static inline vfloat round_to_bfloat16(vfloat value) {
  const vfloat nearest = round_number_to_bfloat16(value);
  return value == value ? nearest : bits_as<vfloat>(vuint{} + FP32_NAN);
}

}  // namespace sdft::SDFT_ISA
