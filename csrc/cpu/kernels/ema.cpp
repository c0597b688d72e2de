#include "ema.h"

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "lanes.h"

namespace sdft::SDFT_ISA {
namespace {

// The first `count` lanes; the others are 0. In the loops `count` is the constant LANES, and a copy is one instruction.
inline vfloat load(const float* from, int count) {
  vfloat value{};
  std::memcpy(&value, from, count * sizeof(*from));
  return value;
}

inline vfloat load(const uint16_t* from, int count) {
  vbfloat16 value{};
  std::memcpy(&value, from, count * sizeof(*from));
  return widen(value);
}

inline void store(float* to, vfloat value, int count) { std::memcpy(to, &value, count * sizeof(*to)); }

inline void store(uint16_t* to, vbfloat16 value, int count) { std::memcpy(to, &value, count * sizeof(*to)); }

struct Step {
  float rate, keep;

  explicit Step(double given) : rate(static_cast<float>(given)), keep(static_cast<float>(1.0 - given)) {}

  vfloat moved(vfloat average, vfloat value) const {
    if (rate < 0.5f) {
      return average + rate * (value - average);
    }
    // Without this case an infinite `value` gives NaN at rate 1: 0 * inf.
    return keep == 0.0f ? value : value - keep * (value - average);
  }
};

// Calls `step(i, count)` for every LANES elements and once for the rest: the same arithmetic, so the same bits.
template <typename step_t>
inline void for_lanes(int64_t begin, int64_t end, step_t step) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) {
    step(i, LANES);
  }
  if (i < end) {
    step(i, static_cast<int>(end - i));
  }
}

template <typename param_t>
void update(float* ema, const param_t* param, Step step, int64_t begin, int64_t end) {
  for_lanes(begin, end, [=](int64_t i, int count) __attribute__((always_inline)) {
    store(ema + i, step.moved(load(ema + i, count), load(param + i, count)), count);
  });
}

template <typename param_t>
void update_hilo(uint16_t* high, uint16_t* low, const param_t* param, Step step, int64_t begin, int64_t end) {
  for_lanes(begin, end, [=](int64_t i, int count) __attribute__((always_inline)) {
    const vfloat average = step.moved(load(high + i, count) + load(low + i, count), load(param + i, count));
    const vfloat upper = round_to_bfloat16(average);
    // 0 where upper is finite; inf - inf and NaN - NaN are NaN.
    const vfloat lower = round_number_to_bfloat16(average - upper);
    store(high + i, narrow(upper), count);
    store(low + i, narrow(upper - upper == vfloat{} ? lower : vfloat{}), count);
  });
}

}  // namespace

void ema_update(float* ema, const float* param, double rate, int64_t begin, int64_t end) {
  update(ema, param, Step(rate), begin, end);
}

void ema_update(float* ema, const uint16_t* param, double rate, int64_t begin, int64_t end) {
  update(ema, param, Step(rate), begin, end);
}

void ema_update_hilo(uint16_t* high, uint16_t* low, const float* param, double rate, int64_t begin, int64_t end) {
  update_hilo(high, low, param, Step(rate), begin, end);
}

void ema_update_hilo(uint16_t* high, uint16_t* low, const uint16_t* param, double rate, int64_t begin, int64_t end) {
  update_hilo(high, low, param, Step(rate), begin, end);
}

}  // namespace sdft::SDFT_ISA
