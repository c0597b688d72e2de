#include "sdft_kernels/prefix_tree.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "host.h"
#include "sdft_kernels/tiles.h"

namespace py = pybind11;

namespace {

using sdft::Integers;

std::string type_name(py::handle object) { return py::type::of(object).attr("__name__").cast<std::string>(); }

// Replaces a TypeError of CPython's by one that names the argument; any other error passes through.
[[noreturn]] void refuse_type(const std::string& message) {
  if (!PyErr_ExceptionMatches(PyExc_TypeError)) {
    throw py::error_already_set();
  }
  PyErr_Clear();
  throw py::type_error(message);
}

template <typename element_t>
void append_strided(const py::buffer_info& info, Integers& out) {
  const char* element = static_cast<const char*>(info.ptr);
  for (py::ssize_t i = 0; i < info.shape[0]; ++i, element += info.strides[0]) {
    element_t value;
    std::memcpy(&value, element, sizeof(value));
    out.push_back(static_cast<int64_t>(value));
  }
}

// Integers of the caller's: in place where they are int64 side by side, else copied. Lives as long as the span is used.
struct Sequence {
  py::buffer_info buffer;
  Integers copied;
  sdft::Span span{nullptr, 0};
};

// Reads a one-dimensional buffer of integers of at most 63 bits; false for any other object.
bool read_buffer(py::handle values, Sequence& out) {
  if (!PyObject_CheckBuffer(values.ptr())) {
    return false;
  }
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(values).request();
  const bool is_signed = info.format.size() == 1 && std::string("bhilq").find(info.format[0]) != std::string::npos;
  const bool is_unsigned = info.format.size() == 1 && std::string("BHI").find(info.format[0]) != std::string::npos;
  if (info.ndim != 1 || !(is_signed || is_unsigned)) {
    return false;
  }
  const bool aligned = reinterpret_cast<uintptr_t>(info.ptr) % alignof(int64_t) == 0;
  if (info.itemsize == 8 && info.strides[0] == 8 && aligned) {
    out.span = {static_cast<const int64_t*>(info.ptr), info.shape[0]};
    out.buffer = std::move(info);
    return true;
  }
  out.copied.reserve(info.shape[0]);
  if (info.itemsize == 8) {
    append_strided<int64_t>(info, out.copied);
  } else if (info.itemsize == 4) {
    is_signed ? append_strided<int32_t>(info, out.copied) : append_strided<uint32_t>(info, out.copied);
  } else if (info.itemsize == 2) {
    is_signed ? append_strided<int16_t>(info, out.copied) : append_strided<uint16_t>(info, out.copied);
  } else {
    is_signed ? append_strided<int8_t>(info, out.copied) : append_strided<uint8_t>(info, out.copied);
  }
  out.span = {out.copied.data(), info.shape[0]};
  return true;
}

int64_t integer(py::handle value, const std::string& name, py::ssize_t index) {
  const auto whole = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!whole) {
    refuse_type(name + "[" + std::to_string(index) + "] must be an integer, got " + type_name(value));
  }
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(whole.ptr(), &overflow);
  if (overflow != 0) {
    throw py::value_error(name + "[" + std::to_string(index) + "] must fit 64 bits, got " +
                          py::str(whole).cast<std::string>());
  }
  return number;
}

// Reads any iterable of integers. `name` is what a message calls it.
Sequence read(py::handle values, const std::string& name) {
  Sequence out;
  if (read_buffer(values, out)) {
    return out;
  }
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(values.ptr(), ""));
  if (!items) {
    refuse_type(name + " must be a sequence of integers, got " + type_name(values));
  }
  out.copied.reserve(PySequence_Fast_GET_SIZE(items.ptr()));
  // The size is read each time: an item's __index__ may be Python code that shortens the list.
  for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
    out.copied.push_back(integer(PySequence_Fast_GET_ITEM(items.ptr(), i), name, i));
  }
  out.span = {out.copied.data(), static_cast<int64_t>(out.copied.size())};
  return out;
}

Integers integers(py::handle values, const std::string& name) {
  const Sequence read_values = read(values, name);
  return Integers(read_values.span.data, read_values.span.data + read_values.span.size);
}

// array.array('q'): a buffer that needs neither torch nor numpy.
py::object to_array(const Integers& values) {
  py::object out = py::module_::import("array").attr("array")("q");
  const auto bytes = static_cast<py::ssize_t>(values.size() * sizeof(int64_t));
  if (bytes > 0) {
    out.attr("frombytes")(py::memoryview::from_memory(static_cast<const void*>(values.data()), bytes));
  }
  return out;
}

py::tuple prefix_tree(const py::iterable& sequences) {
  std::vector<Sequence> read_sequences;
  std::vector<sdft::Span> spans;
  for (const py::handle sequence : sequences) {
    read_sequences.push_back(read(sequence, "sequences[" + std::to_string(spans.size()) + "]"));
    spans.push_back(read_sequences.back().span);
  }
  const sdft::PrefixPlan plan = sdft::prefix_tree(spans);
  return py::make_tuple(to_array(plan.lengths), to_array(plan.parents), to_array(plan.leaves), to_array(plan.tokens));
}

py::tuple ancestors(const py::object& lengths, const py::object& parents) {
  const sdft::Ancestors out = sdft::ancestors(integers(lengths, "lengths"), integers(parents, "parents"));
  return py::make_tuple(to_array(out.offsets), to_array(out.segments));
}

py::object positions(const py::object& lengths, const py::object& parents) {
  return to_array(sdft::positions(integers(lengths, "lengths"), integers(parents, "parents")));
}

py::object tile_table(const py::object& lengths, const py::object& parents, int64_t query_tile) {
  return to_array(sdft::tile_table(integers(lengths, "lengths"), integers(parents, "parents"), query_tile));
}

}  // namespace

// The contract is in sdft_kernels/prefix_attention/planner.py, which calls these.
void bind_prefix_tree(py::module_& m) {
  m.def("prefix_tree", &prefix_tree, py::arg("sequences"),
        "Lengths, parents, leaves and packed tokens of a radix tree.");
  m.def("positions", &positions, py::arg("lengths"), py::arg("parents"),
        "Position of each packed token in its sequence.");
  m.def("ancestors", &ancestors, py::arg("lengths"), py::arg("parents"), "CSR offsets and segments, root to leaf.");
  m.def("tile_table", &tile_table, py::arg("lengths"), py::arg("parents"), py::arg("query_tile"),
        "Rows of three: segment, first token within it, tokens in the tile.");
  py::list tiles;
  for (const sdft::Tiles& row : sdft::TILES) {
    tiles.append(py::make_tuple(row.head_size, row.query_tile, row.key_tile));
  }
  m.attr("TILES") = py::tuple(tiles);
}
