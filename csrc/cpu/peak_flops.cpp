#include "peak_flops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

namespace sdft {
namespace {

// 20,000 steps take 0.06 ms: long beside the clock, short beside a time slice of the scheduler.
constexpr int64_t STEPS = 20000;
constexpr int REPEATS = 200;

// FLOP/s of one core that multiplies and adds in registers: the ceiling of any matrix product there.
double peak_flops_cpu(std::string dtype) {
  STD_TORCH_CHECK(dtype == "fp32" || dtype == "bf16", "peak_flops: dtype must be fp32 or bf16, is ", dtype);
  const bool bf16 = dtype == "bf16";
  STD_TORCH_CHECK(!bf16 || isa() == Isa::avx512_bf16, "peak_flops: bf16 needs AVX512_BF16, this processor runs ",
                  isa_name());
  double best = 0;
  for (int i = 0; i < REPEATS; ++i) {
    float numbers[2] = {0.5f, 0.25f};
    const auto start = std::chrono::steady_clock::now();
    const double flop = SDFT_DISPATCH(multiply_adds, STEPS, bf16, numbers);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, flop / seconds.count());
  }
  return best;
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CompositeExplicitAutograd, m) {
  m.impl("peak_flops", TORCH_BOX(&sdft::peak_flops_cpu));
}
