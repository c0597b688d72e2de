#pragma once

#include <pybind11/pybind11.h>

// Each file of this folder adds its functions to `_host`.
void bind_prefix_tree(pybind11::module_& m);
