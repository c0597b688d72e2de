#pragma once

#if !defined(__CUDACC__)
#include <cmath>
#endif

// The divergence math of one vocabulary entry and of one row: statistics (add, merge, finish) and the gradient of one
// logit. Written once for the CPU (scalars and vector lanes) and for CUDA; letters and formulas are those of
// sdft_kernels/divergence/README.md, names those of its Triton twin, sdft_kernels/_triton_math.py.
//
// T is a scalar, or a vector of lanes for which `Math<T>` says how to take exponentials and how to choose.

#if defined(__CUDACC__)
#define SDFT_INLINE __host__ __device__ __forceinline__
#else
#define SDFT_INLINE inline
#endif

// Code that is compiled once per instruction set lives in a namespace named after it (csrc/cpu/isa.h).
#if !defined(SDFT_ISA)
#define SDFT_ISA scalar
#endif

namespace sdft::SDFT_ISA {

// |log p_s - log p_t| beyond this is infinite to a mixture (e^-80 is 0 next to 1), and e^80 is finite in fp32.
constexpr float GAP_LIMIT = 80.0f;

// What a vocabulary entry's arithmetic needs of its number type. `Element` is the scalar that its lanes hold.
template <typename T>
struct Math;

template <>
struct Math<float> {
  using Element = float;
  static SDFT_INLINE float exp(float x) { return ::expf(x); }
  static SDFT_INLINE float expm1(float x) { return ::expm1f(x); }
  static SDFT_INLINE float log1p(float x) { return ::log1pf(x); }
  static SDFT_INLINE float tanh(float x) { return ::tanhf(x); }
  static SDFT_INLINE float where(bool chosen, float a, float b) { return chosen ? a : b; }
};

template <>
struct Math<double> {
  using Element = double;
  static SDFT_INLINE double exp(double x) { return ::exp(x); }
  static SDFT_INLINE double expm1(double x) { return ::expm1(x); }
  static SDFT_INLINE double log1p(double x) { return ::log1p(x); }
  static SDFT_INLINE double tanh(double x) { return ::tanh(x); }
  static SDFT_INLINE double where(bool chosen, double a, double b) { return chosen ? a : b; }
};

template <typename T>
using Element = typename Math<T>::Element;

template <typename T>
SDFT_INLINE T broadcast_as(Element<T> value) {
  return T{} + value;
}

// max(x, 0) that keeps a NaN.
template <typename T>
SDFT_INLINE T not_negative(T x) {
  return Math<T>::where(x < Element<T>(0), T{}, x);
}

// weight * value, and exactly 0 where the weight is 0, whatever the value.
template <typename T>
SDFT_INLINE T select(T weight, T value) {
  return Math<T>::where(weight == Element<T>(0), T{}, weight * value);
}

// From a raw logit to z = outer * tanh(inner * a) (capped), or outer * a; a logit of -inf stays -inf.
template <typename E>
struct ToZ {
  bool capped;
  E inner, outer;

  template <typename T>
  SDFT_INLINE T operator()(T raw) const {
    if (!capped) {
      return raw * outer;
    }
    return Math<T>::where(raw == E(-INFINITY), raw, Math<T>::tanh(raw * inner) * outer);
  }

  // dc/du of the softcap at this z: 1 - (c / cap)^2, and 0 at a logit of -inf.
  template <typename T>
  SDFT_INLINE T bend(T z) const {
    const T ratio = z * (E(1) / outer);
    return not_negative(E(1) - ratio * ratio);
  }
};

// What is subtracted from the logits: their maximum, or 0 where all of them are -inf.
template <typename T>
SDFT_INLINE T pivot(T maximum) {
  return Math<T>::where(maximum == Element<T>(-INFINITY), T{}, maximum);
}

// Sums about a pair of pivots (README, "The statistics"); `joint` counts entries where both models have their maximum.
template <typename T>
struct Sums {
  T sum_s{}, sum_t{}, first_s{}, first_t{}, gap_s{}, gap_t{}, joint{};

  // One entry (or one a lane) by its pivoted logits.
  SDFT_INLINE void add(T y_s, T y_t) { add(y_s, y_t, Math<T>::exp(y_s), Math<T>::exp(y_t)); }

  // The same with its exponentials. What has an e of 0 is dropped, not multiplied: it may stand beside an infinite gap.
  SDFT_INLINE void add(T y_s, T y_t, T e_s, T e_t) {
    using M = Math<T>;
    const T gap = y_s - y_t, zero{};
    const auto none_s = e_s == Element<T>(0), none_t = e_t == Element<T>(0);
    sum_s += e_s;
    sum_t += e_t;
    first_s += M::where(none_s, zero, e_s * y_s);
    first_t += M::where(none_t, zero, e_t * y_t);
    gap_s += M::where(none_s, zero, e_s * gap);
    gap_t += M::where(none_t, zero, e_t * gap);
    joint += M::where((y_s == Element<T>(0)) & (y_t == Element<T>(0)), broadcast_as<T>(1), zero);
  }
};

// The statistics of a part of the vocabulary about its own maxima; a part that is all -inf has sums of 0.
template <typename T>
struct Statistics {
  T max_s = T(-INFINITY), max_t = T(-INFINITY);
  Sums<T> sums{};

  // The same about other maxima, none of which is smaller.
  SDFT_INLINE void rescale(T new_s, T new_t) {
    const T d_s = sums.sum_s == T(0) ? T(0) : max_s - pivot(new_s);
    const T d_t = sums.sum_t == T(0) ? T(0) : max_t - pivot(new_t);
    const T r_s = Math<T>::exp(d_s), r_t = Math<T>::exp(d_t);
    sums.gap_s = select(r_s, sums.gap_s + select(sums.sum_s, d_s - d_t));
    sums.gap_t = select(r_t, sums.gap_t + select(sums.sum_t, d_s - d_t));
    sums.first_s = select(r_s, sums.first_s + sums.sum_s * d_s);
    sums.first_t = select(r_t, sums.first_t + sums.sum_t * d_t);
    sums.sum_s = r_s * sums.sum_s;
    sums.sum_t = r_t * sums.sum_t;
    sums.joint = new_s == max_s && new_t == max_t ? sums.joint : T(0);
    max_s = new_s;
    max_t = new_t;
  }

  SDFT_INLINE void merge(Statistics part) {
    const T new_s = part.max_s > max_s ? part.max_s : max_s, new_t = part.max_t > max_t ? part.max_t : max_t;
    rescale(new_s, new_t);
    part.rescale(new_s, new_t);
    sums.sum_s += part.sums.sum_s;
    sums.sum_t += part.sums.sum_t;
    sums.first_s += part.sums.first_s;
    sums.first_t += part.sums.first_t;
    sums.gap_s += part.sums.gap_s;
    sums.gap_t += part.sums.gap_t;
    sums.joint += part.sums.joint;
  }
};

// log(S_s / S_t), exact where the two are close: their difference is, their ratio is not.
template <typename T>
SDFT_INLINE T log_ratio(T sum_s, T sum_t) {
  return Math<T>::log1p((sum_s - sum_t) / sum_t);
}

// log p_s - log m = -log(1 + alpha (e^-q - 1)), exact near q = log p_s - log p_t = 0; `q` is clamped and handed back.
template <typename T>
SDFT_INLINE T over_mixture(T gap, Element<T> log_ratio, Element<T> alpha, T& q) {
  using E = Element<T>;
  q = gap - log_ratio;
  q = Math<T>::where(q > E(GAP_LIMIT), broadcast_as<T>(E(GAP_LIMIT)), q);
  q = Math<T>::where(q < E(-GAP_LIMIT), broadcast_as<T>(E(-GAP_LIMIT)), q);
  return -Math<T>::log1p(Math<T>::expm1(-q) * alpha);
}

// KL(p_s || m) * S_s and KL(p_t || m) * S_t: one entry's terms of the second look.
template <typename T>
struct MixtureSums {
  T student{}, teacher{};

  SDFT_INLINE void add(T y_s, T y_t, Element<T> log_ratio, Element<T> alpha) {
    T q;
    const T over = over_mixture(y_s - y_t, log_ratio, alpha, q);
    student += select(Math<T>::exp(y_s), over);
    teacher += select(Math<T>::exp(y_t), over - q);
  }

  SDFT_INLINE void merge(const MixtureSums& part) {
    student += part.student;
    teacher += part.teacher;
  }
};

// A token's numbers; those of a target and of the mixture are the caller's to fill in.
template <typename T>
struct Numbers {
  T pivot_s, pivot_t, sum_s, sum_t, log_ratio;
  T kl_teacher_student, kl_student_teacher, jsd, student_logprob, student_entropy;
  T teacher_logprob, teacher_entropy, top1_agreement, kl_student_mixture;
};

template <typename T>
SDFT_INLINE Numbers<T> finish(const Statistics<T>& p) {
  Numbers<T> n{};
  const Sums<T>& s = p.sums;
  n.pivot_s = pivot(p.max_s);
  n.pivot_t = pivot(p.max_t);
  n.sum_s = s.sum_s;
  n.sum_t = s.sum_t;
  n.log_ratio = log_ratio(s.sum_s, s.sum_t);
  n.kl_teacher_student = not_negative(n.log_ratio - s.gap_t / s.sum_t);
  n.kl_student_teacher = not_negative(s.gap_s / s.sum_s - n.log_ratio);
  n.student_entropy = not_negative(Math<T>::log1p(s.sum_s - T(1)) - s.first_s / s.sum_s);
  n.teacher_entropy = not_negative(Math<T>::log1p(s.sum_t - T(1)) - s.first_t / s.sum_t);
  // A NaN in a row, or a row that is all -inf: NaN here.
  n.top1_agreement = (s.joint > T(0) ? T(1) : T(0)) + T(0) * (s.sum_s + s.sum_t + n.log_ratio);
  return n;
}

// Upstream gradients of the five differentiable numbers, in the order of `fields.DIFFERENTIABLE`.
template <typename T>
struct Upstream {
  T f, r, j, l, h;
};

// dL/dz of one row, entry by entry (README, "The gradient"), but for the target's own share g_l: (p_s - p_t) g_f and
// p_s times the rest, so that where both models agree the two shares of g_f cancel to the last bit.
template <typename E>
struct Gradient {
  E log_ratio, poison, over_s, over_t, g_f, g_r, g_h, g_m, constant, alpha;

  static SDFT_INLINE Gradient of(const Numbers<E>& n, const Upstream<E>& g, E alpha, E slope) {
    const E g_m = g.j * (E(1) - alpha), log_sum_s = Math<E>::log1p(n.sum_s - E(1));
    const E constant = -g.l - select(g.r, n.kl_student_teacher) - select(g.r, n.log_ratio) -
                       select(g.h, n.student_entropy - log_sum_s) - select(g_m, n.kl_student_mixture);
    const E poison = E(0) * n.log_ratio;  // NaN for a row that is all -inf, whose terms are all dropped
    return {n.log_ratio, poison,      E(1) / n.sum_s, E(1) / n.sum_t,   g.f * slope,
            g.r * slope, g.h * slope, g_m * slope,    constant * slope, alpha};
  }

  // The same in the type of a tile. Rounding 1 / S is the same relative error at every entry, 6e-8 in fp32, which at a
  // p_s - p_t of 1 % of p_s would be 6e-6 of the gradient: what both roundings differ by goes into the constant.
  template <typename real>
  SDFT_INLINE Gradient<real> as() const {
    const E lost = (rounding<real>(over_t) - rounding<real>(over_s)) * g_f;
    return {real(log_ratio), real(poison), real(over_s), real(over_t),          real(g_f),
            real(g_r),       real(g_h),    real(g_m),    real(constant + lost), real(alpha)};
  }

  template <typename T>
  SDFT_INLINE T operator()(T y_s, T y_t) const {
    T rest = broadcast_as<T>(constant);
    if (g_r != E(0)) {
      rest += (y_s - y_t) * g_r;
    }
    if (g_h != E(0)) {
      rest -= y_s * g_h;
    }
    if (g_m != E(0)) {
      T q;
      rest += over_mixture(y_s - y_t, log_ratio, alpha, q) * g_m;
    }
    return of_exponentials(Math<T>::exp(y_s), Math<T>::exp(y_t), rest);
  }

  // From exponentials that over_s and over_t make probabilities; `rest` is `constant` where only g_f and g_l are not 0.
  template <typename T>
  SDFT_INLINE T of_exponentials(T e_s, T e_t, T rest) const {
    const T p_s = e_s * over_s, p_t = e_t * over_t;
    return (p_s - p_t) * g_f + select(p_s, rest) + poison;
  }

 private:
  // Relative error of a factor in the type of a tile; one that makes every probability vanish needs no correction.
  template <typename real>
  static SDFT_INLINE E rounding(E factor) {
    return factor > E(1e-30) ? E(real(factor)) / factor - E(1) : E(0);
  }
};

}  // namespace sdft::SDFT_ISA
