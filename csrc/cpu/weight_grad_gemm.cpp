#include "weight_grad_gemm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "scratch.h"

namespace sdft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Parts of the vocabulary begin at a vector of packed rows.
constexpr int64_t ROW_UNIT = 16;
// Below this many multiply-adds (some 10 us of one core) a second thread costs more than it saves.
constexpr int64_t GRAIN_MULTIPLY_ADDS = 1 << 20;

void check_matrix(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 2, "weight_grad_gemm: ", name, " must have 2 dimensions, has ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, "weight_grad_gemm: ", name, " must be ",
                  dtype == ScalarType::Float ? "fp32" : "bf16");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "weight_grad_gemm: ", name, " must have column stride 1, has ",
                  t.stride(1));
}

void check_inputs(const Tensor& grad, const Tensor& hidden, const Tensor& total) {
  check_matrix(grad, "grad", ScalarType::BFloat16);
  check_matrix(hidden, "hidden", ScalarType::BFloat16);
  check_matrix(total, "total", ScalarType::Float);
  STD_TORCH_CHECK(grad.size(0) == hidden.size(0), "weight_grad_gemm: grad has ", grad.size(0), " rows, hidden has ",
                  hidden.size(0));
  STD_TORCH_CHECK(total.size(0) == grad.size(1) && total.size(1) == hidden.size(1), "weight_grad_gemm: total must be (",
                  grad.size(1), ", ", hidden.size(1), "), is (", total.size(0), ", ", total.size(1), ")");
  STD_TORCH_CHECK(total.size(0) <= 1 || total.stride(0) >= total.size(1), "weight_grad_gemm: rows of total overlap");
  STD_TORCH_CHECK(isa() == Isa::avx512_bf16, "weight_grad_gemm: needs a processor with AVX512_BF16, this one runs ",
                  isa_name());
}

void launch_weight_grad([[maybe_unused]] const WeightGradGemm& gemm) {
#if defined(__x86_64__)
  const int64_t panels = (gemm.size + HIDDEN_PANEL - 1) / HIDDEN_PANEL;
  const int64_t units = (gemm.vocabulary + ROW_UNIT - 1) / ROW_UNIT;
  const Scratch packed(panels * HIDDEN_PANEL_FLOATS);
  for (int64_t token = 0; token < gemm.tokens; token += TOKEN_BLOCK) {
    const int64_t count = std::min(TOKEN_BLOCK, gemm.tokens - token);
    torch::stable::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      avx512::pack_hidden(gemm, token, count, begin, end, packed.data());
    });
    const int64_t grain = std::max<int64_t>(1, GRAIN_MULTIPLY_ADDS / (count * gemm.size * ROW_UNIT));
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(WEIGHT_GRAD_SCRATCH_FLOATS);
      avx512::add_weight_grad(gemm, token, count, begin * ROW_UNIT, std::min(end * ROW_UNIT, gemm.vocabulary),
                              packed.data(), scratch.data());
    });
  }
#endif
}

void weight_grad_gemm_cpu(const Tensor& grad, const Tensor& hidden, Tensor total) {
  check_inputs(grad, hidden, total);
  if (total.numel() == 0) {
    return;
  }
  launch_weight_grad({static_cast<const uint16_t*>(grad.const_data_ptr()),
                      static_cast<const uint16_t*>(hidden.const_data_ptr()),
                      static_cast<float*>(total.mutable_data_ptr()), hidden.size(0), total.size(0), total.size(1),
                      grad.stride(0), hidden.stride(0), total.stride(0)});
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) { m.impl("weight_grad_gemm", TORCH_BOX(&sdft::weight_grad_gemm_cpu)); }
