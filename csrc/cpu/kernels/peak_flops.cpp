#include "peak_flops.h"

#include "gemm_tile.h"

namespace sdft::SDFT_ISA {
namespace {

constexpr int CHAINS = 12;  // independent sums, which hide the latency of one (4 to 6 cycles)

template <class Product>
SDFT_TARGET_BF16 void run(int64_t steps, float* sink) {
  vfloat sum[CHAINS];
  const vfloat left = splat(sink), right = splat(sink + 1);
  for (int i = 0; i < CHAINS; ++i) {
    sum[i] = left;
  }
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) {
      sum[i] = Product::add(left, right, sum[i]);
    }
  }
  for (int i = 1; i < CHAINS; ++i) {
    sum[0] += sum[i];
  }
  sink[0] = sum[0][0];
}

}  // namespace

double multiply_adds(int64_t steps, bool bf16, float* sink) {
  const double flop = 2.0 * CHAINS * LANES * static_cast<double>(steps);
#if defined(__AVX512F__)
  if (bf16) {
    run<Bf16PairProduct>(steps, sink);
    return 2 * flop;
  }
#endif
  static_cast<void>(bf16);
  run<Fp32Product>(steps, sink);
  return flop;
}

}  // namespace sdft::SDFT_ISA
