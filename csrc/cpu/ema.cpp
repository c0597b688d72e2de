#include "sdft_kernels/ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace sdft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves (same value as ATen's GRAIN_SIZE).
constexpr int64_t GRAIN_ELEMENTS = 32768;

void check_inputs(const Tensor& ema, const Tensor& param) {
  STD_TORCH_CHECK(ema.scalar_type() == ScalarType::Float, "ema_update_: ema must be fp32");
  STD_TORCH_CHECK(param.scalar_type() == ScalarType::Float || param.scalar_type() == ScalarType::BFloat16,
                  "ema_update_: param must be fp32 or bf16");
  STD_TORCH_CHECK(ema.is_contiguous() && param.is_contiguous(), "ema_update_: ema and param must be contiguous");
  STD_TORCH_CHECK(ema.dim() == param.dim(), "ema_update_: ema has ", ema.dim(), " dimensions, param has ", param.dim());
  for (int64_t d = 0; d < ema.dim(); ++d) {
    STD_TORCH_CHECK(ema.size(d) == param.size(d), "ema_update_: in dimension ", d, " ema has size ", ema.size(d),
                    ", param has size ", param.size(d));
  }
}

template <typename param_t>
void launch_ema_update(Tensor& ema, const Tensor& param, float rate) {
  auto* ema_data = static_cast<float*>(ema.mutable_data_ptr());
  const auto* param_data = static_cast<const param_t*>(param.const_data_ptr());
  torch::stable::parallel_for(0, ema.numel(), GRAIN_ELEMENTS,
                              [&](int64_t begin, int64_t end) { ema_update(ema_data, param_data, rate, begin, end); });
}

void ema_update_cpu(Tensor ema, const Tensor& param, double rate) {
  check_inputs(ema, param);
  if (param.scalar_type() == ScalarType::Float) {
    launch_ema_update<float>(ema, param, static_cast<float>(rate));
  } else {
    launch_ema_update<bfloat16>(ema, param, static_cast<float>(rate));
  }
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) { m.impl("ema_update_", TORCH_BOX(&sdft::ema_update_cpu)); }
