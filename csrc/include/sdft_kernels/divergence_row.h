#pragma once

#include <cstring>

#include "divergence_math.h"
#include "divergence_task.h"

// What the row kernels of CPU and CUDA do once per row: read its options, close the numbers, write them. `real` is the
// tile's type, E the one that a row's sums are kept in (fp64 on CPU, the tile's on CUDA).
namespace sdft::SDFT_ISA {

constexpr int64_t ABSENT_TARGET = -100;  // _head.ABSENT_TARGET

template <typename real>
SDFT_INLINE bool kept(const DivergenceTask<real>& task, int64_t index) {
  return task.keep == nullptr || task.keep[index] != 0;
}

template <typename E, typename real>
SDFT_INLINE ToZ<E> to_z_of(const DivergenceSide<real>& side) {
  return {side.capped, E(side.inner), E(side.outer)};
}

template <typename real>
SDFT_INLINE int64_t label_of(const DivergenceTask<real>& task, int64_t index) {
  return task.target == nullptr ? ABSENT_TARGET : task.target[index];
}

// z at `label`; 0 where it is not within the row: absent, or in another part of the vocabulary.
template <typename E, typename real>
SDFT_INLINE E label_logit(const DivergenceSide<real>& side, int64_t index, int64_t label, int64_t vocabulary) {
  if (label < 0 || label >= vocabulary) {
    return E(0);
  }
  const real raw = side.logits[index * side.stride + label];
  // Without a softcap in the tile's own precision, as the vector loops have it.
  return side.capped ? to_z_of<E>(side)(E(raw)) : E(to_z_of<real>(side)(raw));
}

// log p[label]; 0 where absent, NaN where out of range.
template <typename E>
SDFT_INLINE E logprob(E label_z, int64_t label, int64_t vocabulary, E pivot, E sum) {
  if (label == ABSENT_TARGET) {
    return E(0);
  }
  return label < 0 || label >= vocabulary ? E(NAN) : label_z - pivot - Math<E>::log1p(sum - E(1));
}

template <typename E>
SDFT_INLINE void set_jsd(Numbers<E>& n, const MixtureSums<E>& sums, E alpha) {
  n.kl_student_mixture = sums.student / n.sum_s;
  n.jsd = not_negative(alpha * (sums.teacher / n.sum_t) + (E(1) - alpha) * n.kl_student_mixture);
}

// The fields of `fields.FIELDS`.
template <typename real, typename E>
SDFT_INLINE void write_tokens(const DivergenceTask<real>& task, const Numbers<E>& n, int64_t index) {
  real* out = task.tokens + index;
  const int64_t count = task.count;
  out[0] = real(n.kl_teacher_student);
  out[count] = real(n.kl_student_teacher);
  out[2 * count] = real(n.jsd);
  out[3 * count] = real(n.student_logprob);
  out[4 * count] = real(n.student_entropy);
  out[5 * count] = real(n.teacher_logprob);
  out[6 * count] = real(n.teacher_entropy);
  out[7 * count] = real(n.top1_agreement);
}

// min(p_s[target] / p_old[target], clip), its logarithm kept within 20; 1 without `old_logprob`.
template <typename real, typename E>
SDFT_INLINE E importance_ratio(const DivergenceTask<real>& task, E student_logprob, int64_t index) {
  if (task.old_logprob == nullptr) {
    return E(1);
  }
  E exponent = student_logprob - E(task.old_logprob[index]);
  exponent = exponent > E(20) ? E(20) : exponent < E(-20) ? E(-20) : exponent;
  const E ratio = Math<E>::exp(exponent);
  return ratio > E(task.importance_clip) ? E(task.importance_clip) : ratio;
}

template <typename E, typename real>
SDFT_INLINE Upstream<E> upstream_of(const DivergenceTask<real>& task, int64_t index, E ratio) {
  const real* w = task.weights + index;
  const int64_t count = task.count;
  return {ratio * E(w[0]), ratio * E(w[count]), ratio * E(w[2 * count]), ratio * E(w[3 * count]),
          ratio * E(w[4 * count])};
}

template <typename E>
SDFT_INLINE E token_loss(const Upstream<E>& g, const Numbers<E>& n) {
  return select(g.f, n.kl_teacher_student) + select(g.r, n.kl_student_teacher) + select(g.j, n.jsd) +
         select(g.l, n.student_logprob) + select(g.h, n.student_entropy);
}

// The upper half of an fp32, rounded to nearest even; a NaN stays one.
SDFT_INLINE uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace sdft::SDFT_ISA
