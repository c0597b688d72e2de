#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

// bf16 in lanes: an fp32's upper half, so widening is exact and rounding is integer arithmetic on the bits.
// VCVTNEPS2BF16 is not used: it flushes denormals, and every instruction set shall give the same bits. Only for files
// that CMake compiles once per instruction set.
namespace sdft::SDFT_ISA {

using vuint = uint32_t __attribute__((vector_size(LANE_BYTES)));
using vbfloat16 = uint16_t __attribute__((vector_size(LANE_BYTES / 2)));

constexpr uint16_t BF16_NAN = 0x7FC0;
constexpr uint16_t BF16_INFINITY = 0x7F80;

static inline vfloat widen(vbfloat16 value) {
  const vuint bits = __builtin_convertvector(value, vuint) << 16;
  vfloat wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// To nearest, ties to even. The increment would carry a NaN of all ones over to -0, so every NaN becomes BF16_NAN.
static inline vbfloat16 round_to_bfloat16(vfloat value) {
  vuint bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const vuint nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vuint nan = vuint{} + BF16_NAN;
  return __builtin_convertvector(value == value ? nearest : nan, vbfloat16);
}

}  // namespace sdft::SDFT_ISA
