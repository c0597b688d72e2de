#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "sdft_kernels/divergence_task.h"

// The edge of the divergence's row kernels: from tensors to `DivergenceTask`. The caller is rows_native.py; what is
// checked here keeps a wrong call from touching memory that is not its own.
namespace sdft::edge {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename real>
constexpr ScalarType TYPE = sizeof(real) == sizeof(float) ? ScalarType::Float : ScalarType::Double;

template <typename real>
DivergenceSide<real> side_of(const Tensor& tile, const Tensor& like, double inner, double outer, const char* name) {
  STD_TORCH_CHECK(tile.dim() == 2 && tile.size(0) == like.size(0) && tile.size(1) == like.size(1),
                  "divergence_rows_: ", name, " must be a matrix of the other's shape");
  STD_TORCH_CHECK(tile.scalar_type() == TYPE<real>, "divergence_rows_: both tiles must be fp32, or both fp64");
  STD_TORCH_CHECK(tile.size(1) <= 1 || tile.stride(1) == 1, "divergence_rows_: rows of ", name, " must be contiguous");
  STD_TORCH_CHECK(tile.size(0) <= 1 || tile.stride(0) >= tile.size(1), "divergence_rows_: rows of ", name, " overlap");
  return {static_cast<real*>(tile.mutable_data_ptr()), tile.stride(0), inner != 0.0, inner, outer};
}

// A contiguous (rows, count) table; null if it is not given.
template <typename element>
element* table(const MaybeTensor& tensor, int64_t rows, int64_t count, ScalarType type, const char* name) {
  if (!tensor) {
    return nullptr;
  }
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous(), "divergence_rows_: ", name,
                  " has the wrong dtype or is not contiguous");
  STD_TORCH_CHECK(tensor->numel() == rows * count, "divergence_rows_: ", name, " must have ", rows * count,
                  " elements, has ", tensor->numel());
  return static_cast<element*>(tensor->mutable_data_ptr());
}

template <typename real>
void set_gradient(DivergenceTask<real>& task, const Tensor& gradient, const Tensor& student) {
  const bool same = gradient.scalar_type() == TYPE<real>;
  STD_TORCH_CHECK(same || (sizeof(real) == sizeof(float) && gradient.scalar_type() == ScalarType::BFloat16),
                  "divergence_rows_: gradient must have the tile's dtype, or bf16 over a tile in fp32");
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == task.count && gradient.size(1) >= task.vocabulary &&
                      (gradient.size(1) <= 1 || gradient.stride(1) == 1) &&
                      (task.count <= 1 || gradient.stride(0) >= gradient.size(1)),
                  "divergence_rows_: gradient must have the tile's shape, or more columns, to be filled with 0");
  STD_TORCH_CHECK(gradient.const_data_ptr() == student.const_data_ptr() &&
                      (task.count <= 1 || gradient.stride(0) == (same ? 1 : 2) * student.stride(0)),
                  "divergence_rows_: each row of gradient must start where the student's does");
  task.gradient_kind = same ? GradientKind::same : GradientKind::bf16;
  task.gradient = gradient.mutable_data_ptr();
  task.gradient_stride = gradient.stride(0);
  task.gradient_columns = gradient.size(1);
}

// The operator `divergence_rows_` on the device of `Rows`, whose run(stage, task, stream) is called.
template <typename Rows>
void divergence_rows(std::string stage, Tensor student, Tensor teacher, MaybeTensor target, MaybeTensor keep,
                     MaybeTensor weights, MaybeTensor old_logprob, double clip, double inner_s, double outer_s,
                     double inner_t, double outer_t, double slope, std::optional<double> alpha, MaybeTensor tokens,
                     MaybeTensor loss, MaybeTensor state, MaybeTensor partial, MaybeTensor sums, MaybeTensor gradient,
                     int64_t stream) {
  const auto launch = [&](auto real_value) {
    using real = decltype(real_value);
    DivergenceTask<real> task{};
    task.student = side_of<real>(student, teacher, inner_s, outer_s, "student");
    task.teacher = side_of<real>(teacher, student, inner_t, outer_t, "teacher");
    const int64_t count = task.count = student.size(0);
    task.vocabulary = student.size(1);
    task.slope = slope;
    task.has_alpha = alpha.has_value();
    task.alpha = alpha.value_or(0.0);
    task.target = table<int64_t>(target, 1, count, ScalarType::Long, "target");
    task.keep = table<uint8_t>(keep, 1, count, ScalarType::Byte, "keep");
    task.weights = table<real>(weights, 5, count, TYPE<real>, "weights");
    task.old_logprob = table<real>(old_logprob, 1, count, TYPE<real>, "old_logprob");
    task.importance_clip = clip;
    task.tokens = table<real>(tokens, 8, count, TYPE<real>, "tokens");
    task.loss = table<real>(loss, 1, count, TYPE<real>, "loss");
    task.state = table<double>(state, 7, count, ScalarType::Double, "state");
    task.partial = table<double>(partial, 11, count, ScalarType::Double, "partial");
    task.sums = table<real>(sums, 2, count, TYPE<real>, "sums");
    if (gradient) {
      set_gradient(task, *gradient, student);
    }
    Rows::run(stage, task, stream);
  };
  student.scalar_type() == ScalarType::Double ? launch(double()) : launch(float());
}

}  // namespace sdft::edge
