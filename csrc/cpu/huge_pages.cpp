#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdft {
namespace {

using torch::stable::Tensor;

// Asks for pages of 2 MiB under a fresh tensor: its first use then faults once per 2 MiB and not once per 4 KiB. Only
// whole huge pages within the tensor are asked for; what else lies in its allocation is left alone. A kernel that has
// none does nothing.
void prefer_huge_pages(Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel() * tensor.element_size());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)tensor;
#endif
}

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CPU, m) { m.impl("prefer_huge_pages_", TORCH_BOX(&sdft::prefer_huge_pages)); }
