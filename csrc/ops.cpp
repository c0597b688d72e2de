// Schemas of the compiled operators. A fragment: the operators written in Python live in the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(sdft_kernels, m) {
  m.def("ema_update_(Tensor(a!) ema, Tensor param, float rate) -> ()");
  m.def("ema_update_hilo_(Tensor(a!) high, Tensor(b!) low, Tensor param, float rate) -> ()");
}
