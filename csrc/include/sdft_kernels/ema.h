#pragma once

#include <cstdint>
#include <cstring>

namespace sdft {

// bf16 is the upper half of an fp32, so widening is exact.
struct bfloat16 {
  uint16_t bits;

  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

// ema[i] += rate * (param[i] - ema[i]) for i in [begin, end).
//
// Like torch.lerp, the form changes at rate 0.5: the first would not give exactly `param` at rate 1.
template <typename param_t>
void ema_update(float* ema, const param_t* param, float rate, int64_t begin, int64_t end) {
  if (rate < 0.5f) {
    for (int64_t i = begin; i < end; ++i) {
      ema[i] += rate * (static_cast<float>(param[i]) - ema[i]);
    }
  } else {
    const float keep = 1.0f - rate;
    for (int64_t i = begin; i < end; ++i) {
      const float value = static_cast<float>(param[i]);
      ema[i] = value - keep * (value - ema[i]);
    }
  }
}

}  // namespace sdft
