#include "logits_gemm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "scratch.h"

namespace sdft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many multiply-adds (some 20 us of one core) a second thread costs more than it saves.
constexpr int64_t GRAIN_MULTIPLY_ADDS = 1 << 20;

void check_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "logits_gemm: ", name, " must have 2 dimensions, has ", t.dim());
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "logits_gemm: ", name, " must have column stride 1, has ",
                  t.stride(1));
}

void check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& out) {
  check_matrix(hidden, "hidden");
  check_matrix(weight, "weight");
  check_matrix(out, "out");
  STD_TORCH_CHECK(hidden.scalar_type() == ScalarType::Float || hidden.scalar_type() == ScalarType::BFloat16,
                  "logits_gemm: hidden must be fp32 or bf16");
  STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "logits_gemm: weight must have hidden's dtype");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "logits_gemm: out must be fp32");
  STD_TORCH_CHECK(hidden.size(1) == weight.size(1), "logits_gemm: hidden has ", hidden.size(1), " columns, weight has ",
                  weight.size(1));
  STD_TORCH_CHECK(out.size(0) == hidden.size(0) && out.size(1) == weight.size(0), "logits_gemm: out must be (",
                  hidden.size(0), ", ", weight.size(0), "), is (", out.size(0), ", ", out.size(1), ")");
  STD_TORCH_CHECK(out.size(0) <= 1 || out.stride(0) >= out.size(1), "logits_gemm: rows of out overlap");
}

void logits_gemm_cpu(const Tensor& hidden, const Tensor& weight, Tensor out, bool few) {
  check_inputs(hidden, weight, out);
  const bool bf16 = hidden.scalar_type() == ScalarType::BFloat16;
  const LogitsGemm gemm{hidden.const_data_ptr(),
                        weight.const_data_ptr(),
                        static_cast<float*>(out.mutable_data_ptr()),
                        hidden.size(0),
                        weight.size(0),
                        hidden.size(1),
                        hidden.stride(0),
                        weight.stride(0),
                        out.stride(0),
                        bf16,
                        bf16 && isa() == Isa::avx512_bf16,
                        few};
  const int64_t units = (gemm.vocabulary + COLUMN_UNIT - 1) / COLUMN_UNIT;
  // Reading the weight takes the time of 8 tokens' arithmetic.
  const int64_t unit_work = std::max<int64_t>(1, std::max<int64_t>(8, gemm.tokens) * gemm.size * COLUMN_UNIT);
  const int64_t grain = std::max<int64_t>(1, GRAIN_MULTIPLY_ADDS / unit_work);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(few ? 1 : logits_scratch_floats(gemm.words()));
    SDFT_DISPATCH(logits_gemm, gemm, begin * COLUMN_UNIT, std::min(end * COLUMN_UNIT, gemm.vocabulary), scratch.data());
  });
}

std::string cpu_isa() { return isa_name(); }

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) { m.impl("logits_gemm", TORCH_BOX(&sdft::logits_gemm_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&sdft::cpu_isa)); }
