#pragma once

#include <cstdint>

// What the divergence's row kernels read and write, on CPU and CUDA: raw pointers into (count, vocabulary) tiles of
// logits and (fields, count) tables. Plain data, so that every instruction set's build shares it.
namespace sdft {

// One model's tile and its way from raw logits to z (`ToZ` of divergence_math.h).
template <typename real>
struct DivergenceSide {
  real* logits;  // the CPU's affine kernel may leave exponentials in them
  int64_t stride;
  bool capped;
  double inner, outer;
};

enum class GradientKind { none, same, bf16 };  // `same`: the tile's type

template <typename real>
struct DivergenceTask {
  DivergenceSide<real> student, teacher;
  int64_t count, vocabulary;
  double slope;    // dz/da of the student where no softcap bends it
  bool has_alpha;  // the JSD is asked for
  double alpha;
  const int64_t* target;    // (count), or null
  const uint8_t* keep;      // (count), or null; a row that is not kept is never read, and its gradient is 0
  const real* weights;      // (5, count) of `fields.DIFFERENTIABLE`
  const real* old_logprob;  // (count), or null
  double importance_clip;
  real* tokens;     // (8, count) of `fields.FIELDS`
  real* loss;       // (count)
  double* state;    // (7, count) of `statistics.STATE`; fp32 sums would cost the gradient 4e-6 where p_s - p_t is 1 %
  double* partial;  // (11, count) of `statistics.PARTIAL`
  real* sums;       // (2, count): KL(p_s || m) and KL(p_t || m) of a part of the vocabulary
  GradientKind gradient_kind;
  void* gradient;  // over the student's tile: row r at r * gradient_stride elements of its own type
  int64_t gradient_stride;
  int64_t gradient_columns;  // at least `vocabulary`; the CPU kernels write zeros beyond it
};

}  // namespace sdft
