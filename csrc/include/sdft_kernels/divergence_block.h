#pragma once

#include "divergence_row.h"

// The affine row kernel of a cluster of thread blocks: statistics, token loss and gradient of one row, each logit read
// once. Every block keeps its slice of both models' rows in shared memory and tells the others its statistics through
// theirs. Without room for that (RESIDENT false) the gradient reads the row again.
//
// `Block` is the hardware: a CUDA thread block, or its emulation on the host (tests/emulator), where every thread of a
// cluster is a thread and every barrier a barrier. It has thread(), threads(), rank(), blocks(), sync(),
// cluster_sync(), shuffle(value, mask) within 32 threads, shared(), remote(pointer, rank) and store(pointer, quad).
#if defined(__CUDACC__)
#define SDFT_BLOCK_INLINE __device__ __forceinline__
#else
#define SDFT_BLOCK_INLINE inline
#endif

namespace sdft::SDFT_ISA {

constexpr int WARP_THREADS = 32, MAX_WARPS = 32, MAX_BLOCKS = 16;
constexpr int QUAD = 4;  // logits that a thread takes at a time: 16 bytes of fp32

template <typename real>
struct alignas(QUAD * sizeof(real) < 16 ? QUAD * sizeof(real) : 16) Quad {
  real at[QUAD];
};

// Where partial results meet: those of a block's warps, and those of a cluster's blocks.
template <typename Part>
struct Meeting {
  Part warps[MAX_WARPS];
  Part blocks[MAX_BLOCKS];
};

template <typename real>
struct BlockShared {
  Meeting<Statistics<real>> statistics;
  Meeting<MixtureSums<real>> mixture;
};

// Logits of a row that one block keeps: a multiple of QUAD, the same for every block.
SDFT_INLINE int64_t slice_length(int64_t vocabulary, int blocks) {
  const int64_t quads = (vocabulary + QUAD - 1) / QUAD;
  return (quads + blocks - 1) / blocks * QUAD;
}

// Bytes of shared memory of one block.
template <typename real>
SDFT_INLINE int64_t shared_bytes(int64_t vocabulary, int blocks, bool resident) {
  const int64_t fixed = (sizeof(BlockShared<real>) + 15) / 16 * 16;
  return fixed + (resident ? 2 * slice_length(vocabulary, blocks) * int64_t(sizeof(real)) : 0);
}

template <typename Block, typename real, bool RESIDENT>
class AffineRow {
 public:
  SDFT_BLOCK_INLINE AffineRow(Block& block, const DivergenceTask<real>& task, int64_t index)
      : block_(block),
        task_(task),
        index_(index),
        student_(task.student.logits + index * task.student.stride),
        teacher_(task.teacher.logits + index * task.teacher.stride),
        to_s_(to_z_of<real>(task.student)),
        to_t_(to_z_of<real>(task.teacher)),
        shared_(*static_cast<BlockShared<real>*>(block.shared())) {
    const int64_t slice = slice_length(task.vocabulary, block.blocks());
    begin_ = block.rank() * slice;
    end_ = begin_ + slice < task.vocabulary ? begin_ + slice : task.vocabulary;
    kept_s_ = reinterpret_cast<real*>(static_cast<char*>(block.shared()) + shared_bytes<real>(0, 1, false));
    kept_t_ = kept_s_ + slice;
  }

  SDFT_BLOCK_INLINE void run() {
    const int64_t label = label_of(task_, index_);
    // Before any block writes its gradient over the row.
    const real z_s = label_logit<real>(task_.student, index_, label, task_.vocabulary);
    const real z_t = label_logit<real>(task_.teacher, index_, label, task_.vocabulary);
    Numbers<real> n = finish(together(own_statistics(), shared_.statistics));
    if (task_.target != nullptr) {
      n.student_logprob = logprob(z_s, label, task_.vocabulary, n.pivot_s, n.sum_s);
      n.teacher_logprob = logprob(z_t, label, task_.vocabulary, n.pivot_t, n.sum_t);
    }
    if (task_.has_alpha) {
      set_jsd(n, together(own_mixture_sums(n), shared_.mixture), real(task_.alpha));
    }
    Upstream<real> g = upstream_of<real>(task_, index_, importance_ratio(task_, n.student_logprob, index_));
    if (block_.rank() == 0 && block_.thread() == 0) {
      write_tokens(task_, n, index_);
      task_.loss[index_] = token_loss(g, n);
    }
    if (label == ABSENT_TARGET) {
      g.l = real(0);
    }
    if (task_.gradient_kind != GradientKind::none) {
      write_gradient(n, g, label);
    }
  }

 private:
  SDFT_BLOCK_INLINE int64_t step() const { return int64_t(block_.threads()) * QUAD; }

  // z of both models at the QUAD entries from v on; -inf beyond the vocabulary. Rows are padded to whole quads.
  SDFT_BLOCK_INLINE void read(int64_t v, Quad<real>& z_s, Quad<real>& z_t) const {
    z_s = *reinterpret_cast<const Quad<real>*>(student_ + v);
    z_t = *reinterpret_cast<const Quad<real>*>(teacher_ + v);
    for (int i = 0; i < QUAD; ++i) {
      const bool inside = v + i < task_.vocabulary;
      z_s.at[i] = inside ? to_s_(z_s.at[i]) : real(-INFINITY);
      z_t.at[i] = inside ? to_t_(z_t.at[i]) : real(-INFINITY);
    }
  }

  SDFT_BLOCK_INLINE void read_again(int64_t v, Quad<real>& z_s, Quad<real>& z_t) const {
    if constexpr (RESIDENT) {
      z_s = *reinterpret_cast<const Quad<real>*>(kept_s_ + (v - begin_));
      z_t = *reinterpret_cast<const Quad<real>*>(kept_t_ + (v - begin_));
    } else {
      read(v, z_s, z_t);
    }
  }

  // This thread's entries, about its own running maxima.
  SDFT_BLOCK_INLINE Statistics<real> own_statistics() {
    Statistics<real> all;
    for (int64_t v = begin_ + block_.thread() * QUAD; v < end_; v += step()) {
      Quad<real> z_s, z_t;
      read(v, z_s, z_t);
      if constexpr (RESIDENT) {
        *reinterpret_cast<Quad<real>*>(kept_s_ + (v - begin_)) = z_s;
        *reinterpret_cast<Quad<real>*>(kept_t_ + (v - begin_)) = z_t;
      }
      real new_s = all.max_s, new_t = all.max_t;
      for (int i = 0; i < QUAD; ++i) {
        new_s = z_s.at[i] > new_s ? z_s.at[i] : new_s;
        new_t = z_t.at[i] > new_t ? z_t.at[i] : new_t;
      }
      if (new_s > all.max_s || new_t > all.max_t) {
        all.rescale(new_s, new_t);
      }
      for (int i = 0; i < QUAD; ++i) {
        all.sums.add(z_s.at[i] - pivot(all.max_s), z_t.at[i] - pivot(all.max_t));
      }
    }
    return all;
  }

  SDFT_BLOCK_INLINE MixtureSums<real> own_mixture_sums(const Numbers<real>& n) const {
    MixtureSums<real> all;
    for (int64_t v = begin_ + block_.thread() * QUAD; v < end_; v += step()) {
      Quad<real> z_s, z_t;
      read_again(v, z_s, z_t);
      for (int i = 0; i < QUAD; ++i) {
        all.add(z_s.at[i] - n.pivot_s, z_t.at[i] - n.pivot_t, n.log_ratio, real(task_.alpha));
      }
    }
    return all;
  }

  // The parts of all threads of the cluster, merged in a fixed order: the same bits in every thread, and every time.
  template <typename Part>
  SDFT_BLOCK_INLINE Part together(Part part, Meeting<Part>& meeting) {
    for (int mask = WARP_THREADS / 2; mask > 0; mask /= 2) {
      part.merge(block_.shuffle(part, mask));
    }
    const int warps = block_.threads() / WARP_THREADS;
    if (block_.thread() % WARP_THREADS == 0) {
      meeting.warps[block_.thread() / WARP_THREADS] = part;
    }
    block_.sync();
    part = meeting.warps[0];
    for (int i = 1; i < warps; ++i) {
      part.merge(meeting.warps[i]);
    }
    if (block_.blocks() == 1) {
      return part;
    }
    if (block_.thread() < block_.blocks()) {
      *block_.remote(&meeting.blocks[block_.rank()], block_.thread()) = part;
    }
    block_.cluster_sync();
    part = meeting.blocks[0];
    for (int i = 1; i < block_.blocks(); ++i) {
      part.merge(meeting.blocks[i]);
    }
    return part;
  }

  // All threads take the same number of steps, since one that reads the row again must not write over what another has
  // yet to read: in bf16 a quad lands at or below the place that it came from, so a barrier a step is enough.
  SDFT_BLOCK_INLINE void write_gradient(const Numbers<real>& n, const Upstream<real>& g, int64_t label) {
    const real slope = real(task_.slope);
    const Gradient<real> gradient = Gradient<real>::of(n, g, real(task_.alpha), slope);
    const bool reads_again = !RESIDENT && task_.gradient_kind == GradientKind::bf16;
    for (int64_t base = begin_; base < end_; base += step()) {
      const int64_t v = base + block_.thread() * QUAD;
      Quad<real> z_s, z_t;
      if (v < end_) {
        read_again(v, z_s, z_t);
      }
      if (reads_again) {
        block_.sync();
      }
      if (v < end_) {
        for (int i = 0; i < QUAD; ++i) {
          real value = gradient(z_s.at[i] - n.pivot_s, z_t.at[i] - n.pivot_t);
          value += v + i == label ? g.l * slope : real(0);
          z_t.at[i] = to_s_.capped ? value * to_s_.bend(z_s.at[i]) : value;
        }
        store(v, z_t);
      }
    }
  }

  SDFT_BLOCK_INLINE void store(int64_t v, const Quad<real>& value) const {
    if (task_.gradient_kind == GradientKind::same) {
      real* row = static_cast<real*>(task_.gradient) + index_ * task_.gradient_stride;
      block_.store(reinterpret_cast<Quad<real>*>(row + v), value);
    } else {
      Quad<uint16_t> narrow;
      for (int i = 0; i < QUAD; ++i) {
        narrow.at[i] = to_bf16(float(value.at[i]));
      }
      uint16_t* row = static_cast<uint16_t*>(task_.gradient) + index_ * task_.gradient_stride;
      block_.store(reinterpret_cast<Quad<uint16_t>*>(row + v), narrow);
    }
  }

  Block& block_;
  const DivergenceTask<real>& task_;
  const int64_t index_;
  const real *student_, *teacher_;
  const ToZ<real> to_s_, to_t_;
  BlockShared<real>& shared_;
  int64_t begin_, end_;
  real *kept_s_, *kept_t_;
};

// One row by one cluster of blocks.
template <bool RESIDENT, typename Block, typename real>
SDFT_BLOCK_INLINE void affine_row(Block& block, const DivergenceTask<real>& task, int64_t index) {
  if (kept(task, index)) {
    block.cluster_sync();  // no block writes into the memory of one that has not started
    AffineRow<Block, real, RESIDENT>(block, task, index).run();
  } else if (task.gradient_kind != GradientKind::none && block.rank() == 0) {
    const int64_t size = task.gradient_kind == GradientKind::bf16 ? 2 : int64_t(sizeof(real));
    char* row = static_cast<char*>(task.gradient) + index * task.gradient_stride * size;
    for (int64_t i = block.thread(); i < task.vocabulary * size; i += block.threads()) {
      row[i] = 0;
    }
  }
}

}  // namespace sdft::SDFT_ISA
