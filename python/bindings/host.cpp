#include "host.h"

#include <pybind11/pybind11.h>

#include "build_config.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = SDFT_COMPILER;
  info["flags"] = SDFT_CXX_FLAGS;
  info["cuda"] = SDFT_CUDA;
  info["torch_target"] = SDFT_TORCH_TARGET;
  info["torch_headers"] = SDFT_TORCH_HEADERS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", &build_info,
        "How the compiled parts were built: compiler, flags, cuda (compiler and architectures), torch_target (oldest "
        "torch the operators load in) and torch_headers (the torch they were compiled against).");
  bind_prefix_tree(m);
}
