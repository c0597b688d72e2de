#include "bfloat16.h"
#include "divergence_rows.h"
#include "lanes_math.h"
#include "sdft_kernels/divergence_row.h"

// A row at a time: statistics block by block about the running maxima, the closed forms, then the gradient written over
// the student's logits. A row of both models is read twice, the second time from the cache. Where the gradient needs no
// more than probabilities (the forward KL, the target's log-probability), the first reading leaves exponentials in
// place of the logits: half of all exponentials.
namespace sdft::SDFT_ISA {
namespace {

// Lanes of a tile's type. fp64 goes one entry at a time: it is there for exactness, not for speed.
template <typename real>
struct Lane;

template <>
struct Lane<float> {
  using type = vfloat;
  static constexpr int64_t count = LANES;
};

template <>
struct Lane<double> {
  using type = double;
  static constexpr int64_t count = 1;
};

template <typename real>
using lane_t = typename Lane<real>::type;

// Entries whose maxima are taken before their sums: 32 KiB of both models, which stay in the first cache.
constexpr int64_t BLOCK = 4096;
constexpr int64_t MOST_BLOCKS = 256;  // in which exponentials are kept: rows of up to a million logits

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Lanes at `from`; those beyond `left` are -inf, which contributes nothing to any sum.
template <typename real>
static inline lane_t<real> load_logits(const real* from, int64_t left) {
  lane_t<real> value;
  if (left >= Lane<real>::count) {
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  value = lane_t<real>{} + real(-INFINITY);
  std::memcpy(&value, from, static_cast<size_t>(left) * sizeof(real));
  return value;
}

// The first `left` of the lanes to memory. Whole vectors by a copy of fixed size: one of any size is a call, which
// takes longer than the gradient of a vector.
template <typename element, typename lanes_t>
static inline void store_first(element* to, lanes_t lanes, int64_t left) {
  constexpr int64_t COUNT = static_cast<int64_t>(sizeof(lanes) / sizeof(element));
  if (left >= COUNT) {
    std::memcpy(to, &lanes, sizeof(lanes));
  } else {
    std::memcpy(to, &lanes, static_cast<size_t>(left) * sizeof(element));
  }
}

// In the tile's type, or rounded to bf16 (to nearest even, a NaN stays one).
template <typename real>
static inline void store_lanes(real* to, lane_t<real> value, int64_t left) {
  store_first(to, value, left);
}

static inline void store_lanes(uint16_t* to, vfloat value, int64_t left) {
  store_first(to, narrow(round_to_bfloat16(value)), left);
}

static inline double total(double value) { return value; }

static inline double total(vfloat value) {
  double sum = 0.0;
  for (int i = 0; i < LANES; ++i) {
    sum += static_cast<double>(value[i]);
  }
  return sum;
}

static inline double largest(double value) { return value; }

static inline double largest(vfloat value) {
  float most = value[0];
  for (int i = 1; i < LANES; ++i) {
    most = value[i] > most ? value[i] : most;
  }
  return static_cast<double>(most);
}

template <typename real>
struct Row {
  real *student, *teacher;
  int64_t vocabulary;
  ToZ<real> to_s, to_t;

  Row(const DivergenceTask<real>& task, int64_t row)
      : student(task.student.logits + row * task.student.stride),
        teacher(task.teacher.logits + row * task.teacher.stride),
        vocabulary(task.vocabulary),
        to_s(to_z_of<real>(task.student)),
        to_t(to_z_of<real>(task.teacher)) {}

  // Calls visit(z_s, z_t) for the lanes of entries [begin, end).
  template <typename Visit>
  void each(int64_t begin, int64_t end, Visit visit) const {
    for (int64_t v = begin; v < end; v += Lane<real>::count) {
      visit(to_s(load_logits(student + v, end - v)), to_t(load_logits(teacher + v, end - v)));
    }
  }
};

// About what each block's exponentials were taken.
struct BlockPivots {
  double student[MOST_BLOCKS], teacher[MOST_BLOCKS];
};

// With `keep`, every logit is replaced by its exponential.
template <typename real>
Statistics<double> statistics(const Row<real>& row, BlockPivots* keep = nullptr) {
  using T = lane_t<real>;
  Statistics<double> all;
  for (int64_t begin = 0; begin < row.vocabulary; begin += BLOCK) {
    const int64_t end = smaller(begin + BLOCK, row.vocabulary);
    T max_s = T{} + real(-INFINITY), max_t = max_s;
    row.each(begin, end, [&](T z_s, T z_t) {
      max_s = Math<T>::where(z_s > max_s, z_s, max_s);
      max_t = Math<T>::where(z_t > max_t, z_t, max_t);
    });
    const double block_s = largest(max_s), block_t = largest(max_t);
    all.rescale(block_s > all.max_s ? block_s : all.max_s, block_t > all.max_t ? block_t : all.max_t);
    const real pivot_s = real(pivot(all.max_s)), pivot_t = real(pivot(all.max_t));
    Sums<T> sums;
    if (keep == nullptr) {
      row.each(begin, end, [&](T z_s, T z_t) { sums.add(z_s - pivot_s, z_t - pivot_t); });
    } else {
      keep->student[begin / BLOCK] = double(pivot_s);
      keep->teacher[begin / BLOCK] = double(pivot_t);
      int64_t v = begin;
      row.each(begin, end, [&](T z_s, T z_t) {
        const T y_s = z_s - pivot_s, y_t = z_t - pivot_t, e_s = Math<T>::exp(y_s), e_t = Math<T>::exp(y_t);
        sums.add(y_s, y_t, e_s, e_t);
        store_lanes(row.student + v, e_s, end - v);
        store_lanes(row.teacher + v, e_t, end - v);
        v += Lane<real>::count;
      });
    }
    all.sums.sum_s += total(sums.sum_s);
    all.sums.sum_t += total(sums.sum_t);
    all.sums.first_s += total(sums.first_s);
    all.sums.first_t += total(sums.first_t);
    all.sums.gap_s += total(sums.gap_s);
    all.sums.gap_t += total(sums.gap_t);
    all.sums.joint += total(sums.joint);
  }
  return all;
}

template <typename real>
MixtureSums<double> mixture_sums(const Row<real>& row, const Numbers<double>& n, double alpha) {
  using T = lane_t<real>;
  const real pivot_s = real(n.pivot_s), pivot_t = real(n.pivot_t), shift = real(n.log_ratio);
  MixtureSums<double> all;
  for (int64_t begin = 0; begin < row.vocabulary; begin += BLOCK) {
    MixtureSums<T> sums;
    row.each(begin, smaller(begin + BLOCK, row.vocabulary),
             [&](T z_s, T z_t) { sums.add(z_s - pivot_s, z_t - pivot_t, shift, real(alpha)); });
    all.student += total(sums.student);
    all.teacher += total(sums.teacher);
  }
  return all;
}

template <typename real>
Numbers<double> numbers_of(const DivergenceTask<real>& task, const Row<real>& row, int64_t index,
                           BlockPivots* keep = nullptr) {
  const int64_t label = label_of(task, index), vocabulary = row.vocabulary;
  const double z_s = label_logit<double>(task.student, index, label, vocabulary);
  const double z_t = label_logit<double>(task.teacher, index, label, vocabulary);
  Numbers<double> n = finish(statistics(row, keep));
  if (task.target != nullptr) {
    n.student_logprob = logprob(z_s, label, vocabulary, n.pivot_s, n.sum_s);
    n.teacher_logprob = logprob(z_t, label, vocabulary, n.pivot_t, n.sum_t);
  }
  if (task.has_alpha) {
    set_jsd(n, mixture_sums(row, n, task.alpha), task.alpha);
  }
  write_tokens(task, n, index);
  return n;
}

// True in the lane of this number.
static inline bool lane_is(double, int64_t place) { return place == 0; }

static inline vint lane_is(vfloat, int64_t place) {
  vint lanes;
  for (int i = 0; i < LANES; ++i) {
    lanes[i] = i == place ? -1 : 0;
  }
  return lanes;
}

// Writes value(s, t) of both rows' lanes, of entries [begin, end), at `out`, with the target's own share added. An
// element is written after the lanes that hold it were read, at or below their place: `out` starts where the student's
// row does, and its elements are no wider.
template <typename real, typename out_t, typename Value>
void write_lanes(const Row<real>& row, int64_t begin, int64_t end, int64_t label, real at_label, out_t* out,
                 Value value) {
  using T = lane_t<real>;
  for (int64_t v = begin; v < end; v += Lane<real>::count) {
    T lanes = value(load_logits(row.student + v, end - v), load_logits(row.teacher + v, end - v));
    if (label >= v && label < v + Lane<real>::count) {
      lanes += Math<T>::where(lane_is(T{}, label - v), T{} + at_label, T{});
    }
    store_lanes(out + v, lanes, end - v);
  }
}

template <typename real, typename out_t>
void write_gradient(const DivergenceTask<real>& task, const Row<real>& row, const Numbers<double>& n,
                    const Upstream<double>& g, int64_t label, out_t* out) {
  using T = lane_t<real>;
  const double alpha = task.has_alpha ? task.alpha : 0.0;
  const Gradient<real> gradient = Gradient<double>::of(n, g, alpha, task.slope).template as<real>();
  const real pivot_s = real(n.pivot_s), pivot_t = real(n.pivot_t), no_label = real(0);
  const ToZ<real> to_s = row.to_s, to_t = row.to_t;
  const real at_label = real(g.l * task.slope);
  if (!to_s.capped) {
    write_lanes(row, 0, row.vocabulary, label, at_label, out,
                [&](T s, T t) { return gradient(to_s(s) - pivot_s, to_t(t) - pivot_t); });
    return;
  }
  // The softcap bends the target's share too.
  const real bent = label < 0 || label >= row.vocabulary ? no_label : at_label * to_s.bend(to_s(row.student[label]));
  write_lanes(row, 0, row.vocabulary, label, bent, out, [&](T s, T t) {
    const T z_s = to_s(s);
    return gradient(z_s - pivot_s, to_t(t) - pivot_t) * to_s.bend(z_s);
  });
}

// From the exponentials that `statistics` kept, each block's about its own pivot.
template <typename real, typename out_t>
void write_gradient_of_exponentials(const DivergenceTask<real>& task, const Row<real>& row, const BlockPivots& kept,
                                    const Numbers<double>& n, const Upstream<double>& g, int64_t label, out_t* out) {
  using T = lane_t<real>;
  const real at_label = real(g.l * task.slope);
  for (int64_t begin = 0; begin < row.vocabulary; begin += BLOCK) {
    Numbers<double> of_block = n;
    of_block.sum_s = n.sum_s * Math<double>::exp(n.pivot_s - kept.student[begin / BLOCK]);
    of_block.sum_t = n.sum_t * Math<double>::exp(n.pivot_t - kept.teacher[begin / BLOCK]);
    const Gradient<real> gradient = Gradient<double>::of(of_block, g, 0.0, task.slope).template as<real>();
    const T rest = T{} + gradient.constant;
    write_lanes(row, begin, smaller(begin + BLOCK, row.vocabulary), label, at_label, out,
                [&](T e_s, T e_t) { return gradient.of_exponentials(e_s, e_t, rest); });
  }
}

// Zeros from entry `begin` of a row of the gradient to the end of its columns.
template <typename real>
void zero_gradient(const DivergenceTask<real>& task, int64_t index, int64_t begin) {
  const int64_t size = task.gradient_kind == GradientKind::bf16 ? 2 : static_cast<int64_t>(sizeof(real));
  char* row = static_cast<char*>(task.gradient) + index * task.gradient_stride * size;
  std::memset(row + begin * size, 0, static_cast<size_t>((task.gradient_columns - begin) * size));
}

template <typename real>
void gradient_of_row(const DivergenceTask<real>& task, const Row<real>& row, const Numbers<double>& n,
                     Upstream<double> g, int64_t index, const BlockPivots* kept = nullptr) {
  const int64_t label = label_of(task, index);
  if (label == ABSENT_TARGET) {
    g.l = 0.0;
  }
  const auto write = [&](auto* base) {
    auto* out = base + index * task.gradient_stride;
    if (kept != nullptr) {
      write_gradient_of_exponentials(task, row, *kept, n, g, label, out);
    } else {
      write_gradient(task, row, n, g, label, out);
    }
  };
  if (task.gradient_kind == GradientKind::same) {
    write(static_cast<real*>(task.gradient));
  } else if constexpr (sizeof(real) == sizeof(float)) {
    write(static_cast<uint16_t*>(task.gradient));
  }
  zero_gradient(task, index, task.vocabulary);
}

// Whether this row's gradient is made of probabilities alone.
template <typename real>
bool needs_probabilities_only(const DivergenceTask<real>& task, int64_t index) {
  const real *w = task.weights + index, zero = real(0);
  const int64_t count = task.count;
  return task.gradient_kind != GradientKind::none && !task.has_alpha && !task.student.capped && w[count] == zero &&
         w[2 * count] == zero && w[4 * count] == zero && task.vocabulary <= BLOCK * MOST_BLOCKS;
}

template <typename real>
void affine(const DivergenceTask<real>& task, int64_t begin, int64_t end) {
  BlockPivots pivots;
  for (int64_t i = begin; i < end; ++i) {
    if (kept(task, i)) {
      const Row<real> row(task, i);
      BlockPivots* keep = needs_probabilities_only(task, i) ? &pivots : nullptr;
      const Numbers<double> n = numbers_of(task, row, i, keep);
      const Upstream<double> g = upstream_of<double>(task, i, importance_ratio(task, n.student_logprob, i));
      task.loss[i] = real(token_loss(g, n));
      if (task.gradient_kind != GradientKind::none) {
        gradient_of_row(task, row, n, g, i, keep);
      }
    } else if (task.gradient_kind != GradientKind::none) {
      zero_gradient(task, i, 0);
    }
  }
}

// The entries of `statistics.STATE`.
template <typename real>
void stats(const DivergenceTask<real>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (kept(task, i)) {
      const Numbers<double> n = numbers_of(task, Row<real>(task, i), i);
      const double state[] = {n.pivot_s,         n.pivot_t,           n.sum_s, n.sum_t, n.kl_student_teacher,
                              n.student_entropy, n.kl_student_mixture};
      for (int64_t k = 0; k < 7; ++k) {
        task.state[k * task.count + i] = state[k];
      }
    }
  }
}

template <typename real>
Numbers<double> numbers_from_state(const DivergenceTask<real>& task, int64_t index) {
  const double* s = task.state + index;
  const int64_t count = task.count;
  Numbers<double> n{};
  n.pivot_s = s[0];
  n.pivot_t = s[count];
  n.sum_s = s[2 * count];
  n.sum_t = s[3 * count];
  n.log_ratio = log_ratio(n.sum_s, n.sum_t);
  n.kl_student_teacher = s[4 * count];
  n.student_entropy = s[5 * count];
  n.kl_student_mixture = s[6 * count];
  return n;
}

template <typename real>
void gradient(const DivergenceTask<real>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (kept(task, i)) {
      gradient_of_row(task, Row<real>(task, i), numbers_from_state(task, i), upstream_of<double>(task, i, 1.0), i);
    } else {
      zero_gradient(task, i, 0);
    }
  }
}

// The entries of `statistics.PARTIAL`.
template <typename real>
void partial(const DivergenceTask<real>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (!kept(task, i)) {
      continue;
    }
    const Row<real> row(task, i);
    const Statistics<double> p = statistics(row);
    const int64_t label = label_of(task, i);
    const double entries[] = {p.max_s,
                              p.max_t,
                              p.sums.sum_s,
                              p.sums.sum_t,
                              p.sums.first_s,
                              p.sums.first_t,
                              p.sums.gap_s,
                              p.sums.gap_t,
                              p.sums.joint > 0.0 ? 1.0 : 0.0,
                              label_logit<double>(task.student, i, label, task.vocabulary),
                              label_logit<double>(task.teacher, i, label, task.vocabulary)};
    for (int64_t k = 0; k < 11; ++k) {
      task.partial[k * task.count + i] = entries[k];
    }
  }
}

template <typename real>
void mixture(const DivergenceTask<real>& task, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (kept(task, i)) {
      const Numbers<double> n = numbers_from_state(task, i);
      const MixtureSums<double> sums = mixture_sums(Row<real>(task, i), n, task.alpha);
      task.sums[i] = real(sums.student / n.sum_s);
      task.sums[task.count + i] = real(sums.teacher / n.sum_t);
    }
  }
}

}  // namespace

#define SDFT_DEFINE_DIVERGENCE(real)                                                                               \
  void affine_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end) { affine(task, begin, end); }     \
  void stats_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end) { stats(task, begin, end); }       \
  void gradient_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end) { gradient(task, begin, end); } \
  void partial_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end) { partial(task, begin, end); }   \
  void mixture_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end) { mixture(task, begin, end); }

SDFT_DEFINE_DIVERGENCE(float)
SDFT_DEFINE_DIVERGENCE(double)
#undef SDFT_DEFINE_DIVERGENCE

}  // namespace sdft::SDFT_ISA
