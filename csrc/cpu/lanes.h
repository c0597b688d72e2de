#pragma once

#include <cstdint>
#include <cstring>

// Vectors of floats as the compiler's own type: +, -, *, /, comparisons and ?: work lane by lane, in every build.
// Only for files that CMake compiles once per instruction set.
namespace sdft::SDFT_ISA {

#if defined(__AVX512F__)
constexpr int LANE_BYTES = 64;
#elif defined(__AVX2__)
constexpr int LANE_BYTES = 32;
#else
constexpr int LANE_BYTES = 16;
#endif
constexpr int LANES = LANE_BYTES / static_cast<int>(sizeof(float));

using vfloat = float __attribute__((vector_size(LANE_BYTES)));
using vint = int32_t __attribute__((vector_size(LANE_BYTES)));  // comparisons of vfloat give this: -1 or 0
using vuint = uint32_t __attribute__((vector_size(LANE_BYTES)));

static inline vfloat load(const float* from) {
  vfloat value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

static inline void store(float* to, vfloat value) { std::memcpy(to, &value, sizeof(value)); }

// The same bits as another vector type.
template <typename To, typename From>
static inline To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static inline vfloat broadcast(float value) { return value - vfloat{}; }

}  // namespace sdft::SDFT_ISA
