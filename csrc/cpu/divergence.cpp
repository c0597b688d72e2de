#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "divergence_edge.h"
#include "divergence_rows.h"

namespace sdft {
namespace {

struct CpuRows {
  // Runs a stage, after checking that it was given what it needs.
  template <typename real>
  static void run(const std::string& stage, const DivergenceTask<real>& task, int64_t) {
    const auto each_row = [&](bool complete, auto rows) {
      STD_TORCH_CHECK(complete, "divergence_rows_: an argument of stage '", stage, "' is missing");
      // A row is some 10^5 entries, or the tile is small.
      torch::stable::parallel_for(0, task.count, 1, rows);
    };
    if (stage == "affine") {
      each_row(task.weights && task.tokens && task.loss,
               [&](int64_t begin, int64_t end) { SDFT_DISPATCH(affine_rows, task, begin, end); });
    } else if (stage == "stats") {
      each_row(task.tokens && task.state,
               [&](int64_t begin, int64_t end) { SDFT_DISPATCH(stats_rows, task, begin, end); });
    } else if (stage == "gradient") {
      each_row(task.weights && task.state && task.gradient,
               [&](int64_t begin, int64_t end) { SDFT_DISPATCH(gradient_rows, task, begin, end); });
    } else if (stage == "partial") {
      each_row(task.partial != nullptr,
               [&](int64_t begin, int64_t end) { SDFT_DISPATCH(partial_rows, task, begin, end); });
    } else if (stage == "mixture") {
      each_row(task.state && task.sums && task.has_alpha,
               [&](int64_t begin, int64_t end) { SDFT_DISPATCH(mixture_rows, task, begin, end); });
    } else {
      STD_TORCH_CHECK(false, "divergence_rows_: no stage '", stage, "'");
    }
  }
};

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) {
  m.impl("divergence_rows_", TORCH_BOX(&sdft::edge::divergence_rows<sdft::CpuRows>));
}
