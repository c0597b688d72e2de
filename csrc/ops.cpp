// Schemas of the compiled operators. A fragment: the operators written in Python live in the same namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(sdft_kernels, m) {
  m.def("prefer_huge_pages_(Tensor(a!) tensor) -> ()");
  m.def("ema_update_(Tensor(a!) ema, Tensor param, float rate) -> ()");
  m.def("ema_update_hilo_(Tensor(a!) high, Tensor(b!) low, Tensor param, float rate) -> ()");
  // Stages: affine | stats | gradient | partial | mixture, each with the arguments that it reads and writes (all
  // written ones in place). A softcap of none has an inner factor of 0.
  m.def(
      "divergence_rows_(str stage, Tensor(a!) student, Tensor(h!) teacher, Tensor? target, Tensor? keep, Tensor? "
      "weights, "
      "Tensor? old_logprob, float importance_clip, float inner_s, float outer_s, float inner_t, float outer_t, "
      "float slope, float? alpha, Tensor(b!)? tokens, Tensor(c!)? loss, Tensor(d!)? state, Tensor(e!)? partial, "
      "Tensor(f!)? sums, Tensor(g!)? gradient, int stream) -> ()");
  m.def("logits_gemm(Tensor hidden, Tensor weight, Tensor(a!) out, bool few=False) -> ()");
  m.def("weight_grad_gemm(Tensor grad, Tensor hidden, Tensor(a!) total) -> ()");
  // Tables of a prefix tree as in `PrefixTree`; a softcap of none is 0. `partial` (parts, 2, tokens, key heads, size)
  // is scratch, and its first part becomes the gradients of key and value.
  m.def(
      "prefix_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? cached_key, Tensor? "
      "cached_value, "
      "Tensor tiles, Tensor segments, Tensor ancestor_offsets, Tensor ancestors, float scale, float softcap, int "
      "window, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "prefix_attention_backward(Tensor query, Tensor key, Tensor value, Tensor? cached_key, Tensor? cached_value, "
      "Tensor tiles, Tensor segments, Tensor ancestor_offsets, Tensor ancestors, float scale, float softcap, int "
      "window, "
      "Tensor out, Tensor lse, Tensor grad, Tensor? grad_lse, Tensor(a!) delta, Tensor(b!) grad_query, "
      "Tensor(c!) partial) -> ()");
  m.def("cpu_isa() -> str");
  m.def("peak_flops(str dtype) -> float");
}
