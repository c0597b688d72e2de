#include "ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "isa.h"

namespace sdft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves (same value as ATen's GRAIN_SIZE).
constexpr int64_t GRAIN_ELEMENTS = 32768;

void check_like_param(const char* op, const char* name, const Tensor& average, const Tensor& param) {
  STD_TORCH_CHECK(average.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(average.dim() == param.dim(), op, ": ", name, " has ", average.dim(), " dimensions, param has ",
                  param.dim());
  for (int64_t d = 0; d < param.dim(); ++d) {
    STD_TORCH_CHECK(average.size(d) == param.size(d), op, ": in dimension ", d, " ", name, " has size ",
                    average.size(d), ", param has size ", param.size(d));
  }
}

void check_param(const char* op, const Tensor& param, double rate) {
  STD_TORCH_CHECK(param.scalar_type() == ScalarType::Float || param.scalar_type() == ScalarType::BFloat16, op,
                  ": param must be fp32 or bf16");
  STD_TORCH_CHECK(param.is_contiguous(), op, ": param must be contiguous");
  STD_TORCH_CHECK(rate >= 0.0 && rate <= 1.0, op, ": rate must be in [0, 1], got ", rate);
}

template <typename element_t>
const element_t* elements(const Tensor& tensor) {
  return static_cast<const element_t*>(tensor.const_data_ptr());
}

template <typename element_t>
element_t* mutable_elements(Tensor& tensor) {
  return static_cast<element_t*>(tensor.mutable_data_ptr());
}

// Calls `launch(pointer)` with param's elements in their type: fp32, or the bits of bf16.
template <typename launch_t>
void with_param(const Tensor& param, launch_t launch) {
  if (param.scalar_type() == ScalarType::Float) {
    launch(elements<float>(param));
  } else {
    launch(elements<uint16_t>(param));
  }
}

void ema_update_cpu(Tensor ema, const Tensor& param, double rate) {
  const char* op = "ema_update_";
  STD_TORCH_CHECK(ema.scalar_type() == ScalarType::Float, op, ": ema must be fp32");
  check_param(op, param, rate);
  check_like_param(op, "ema", ema, param);
  if (rate == 0.0) {
    return;  // 0 * inf would be NaN
  }
  auto* average = mutable_elements<float>(ema);
  with_param(param, [&](const auto* value) {
    torch::stable::parallel_for(0, param.numel(), GRAIN_ELEMENTS, [&](int64_t begin, int64_t end) {
      SDFT_DISPATCH(ema_update, average, value, rate, begin, end);
    });
  });
}

void ema_update_hilo_cpu(Tensor high, Tensor low, const Tensor& param, double rate) {
  const char* op = "ema_update_hilo_";
  STD_TORCH_CHECK(high.scalar_type() == ScalarType::BFloat16 && low.scalar_type() == ScalarType::BFloat16, op,
                  ": high and low must be bf16");
  check_param(op, param, rate);
  check_like_param(op, "high", high, param);
  check_like_param(op, "low", low, param);
  if (rate == 0.0) {
    return;
  }
  auto *upper = mutable_elements<uint16_t>(high), *lower = mutable_elements<uint16_t>(low);
  with_param(param, [&](const auto* value) {
    torch::stable::parallel_for(0, param.numel(), GRAIN_ELEMENTS, [&](int64_t begin, int64_t end) {
      SDFT_DISPATCH(ema_update_hilo, upper, lower, value, rate, begin, end);
    });
  });
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&sdft::ema_update_cpu));
  m.impl("ema_update_hilo_", TORCH_BOX(&sdft::ema_update_hilo_cpu));
}
