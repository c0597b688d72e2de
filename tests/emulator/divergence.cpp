// The CUDA row kernel of csrc/include/sdft_kernels/divergence_block.h on the host: a thread for every thread of a
// cluster, a barrier for every barrier. Built and called by tests/emulator.py; never shipped.
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "sdft_kernels/divergence_block.h"

namespace {

using namespace sdft;
using namespace sdft::scalar;

// What the threads of one block share.
struct Hardware {
  explicit Hardware(int threads, int64_t bytes)
      : barrier(threads), memory(static_cast<size_t>(bytes) / 16 + 1), slots(static_cast<size_t>(threads)) {}

  struct alignas(16) Line {
    char bytes[16];
  };
  struct Slot {
    char bytes[256];
  };
  std::barrier<> barrier;
  std::vector<Line> memory;
  std::vector<Slot> slots;
};

struct EmulatedBlock {
  std::vector<std::unique_ptr<Hardware>>& cluster;
  std::barrier<>& all;
  int rank_, thread_, threads_;

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int rank() const { return rank_; }
  int blocks() const { return static_cast<int>(cluster.size()); }
  void sync() { own().barrier.arrive_and_wait(); }
  void cluster_sync() { all.arrive_and_wait(); }
  void* shared() { return own().memory.data(); }

  template <typename T>
  T* remote(T* place, int rank) {
    const auto offset = reinterpret_cast<char*>(place) - reinterpret_cast<char*>(own().memory.data());
    return reinterpret_cast<T*>(reinterpret_cast<char*>(cluster[static_cast<size_t>(rank)]->memory.data()) + offset);
  }

  template <typename T>
  static void store(T* to, const T& value) {
    *to = value;
  }

  template <typename T>
  T shuffle(const T& value, int mask) {
    static_assert(sizeof(T) <= sizeof(Hardware::Slot));
    std::memcpy(own().slots[static_cast<size_t>(thread_)].bytes, &value, sizeof(T));
    sync();
    T partner = value;
    std::memcpy(&partner, own().slots[static_cast<size_t>(thread_ ^ mask)].bytes, sizeof(T));
    sync();
    return partner;
  }

 private:
  Hardware& own() { return *cluster[static_cast<size_t>(rank_)]; }
};

template <typename real>
void run(const DivergenceTask<real>& task, int blocks, int threads, bool resident) {
  const int64_t bytes = shared_bytes<real>(task.vocabulary, blocks, resident);
  for (int64_t row = 0; row < task.count; ++row) {
    std::vector<std::unique_ptr<Hardware>> cluster;
    for (int i = 0; i < blocks; ++i) {
      cluster.push_back(std::make_unique<Hardware>(threads, bytes));
      // Shared memory holds anything at first.
      std::memset(static_cast<void*>(cluster.back()->memory.data()), 0xff, static_cast<size_t>(bytes));
    }
    std::barrier<> all(blocks * threads);
    std::vector<std::thread> running;
    for (int i = 0; i < blocks * threads; ++i) {
      running.emplace_back([&, i] {
        EmulatedBlock block{cluster, all, i / threads, i % threads, threads};
        if (resident) {
          affine_row<true>(block, task, row);
        } else {
          affine_row<false>(block, task, row);
        }
      });
    }
    for (std::thread& thread : running) {
      thread.join();
    }
  }
}

template <typename real>
void launch(const double* numbers, const int64_t* sizes, void* const* pointers) {
  DivergenceTask<real> task{};
  task.student = {static_cast<real*>(pointers[0]), sizes[2], numbers[0] != 0.0, numbers[0], numbers[1]};
  task.teacher = {static_cast<real*>(pointers[1]), sizes[2], numbers[2] != 0.0, numbers[2], numbers[3]};
  task.count = sizes[0];
  task.vocabulary = sizes[1];
  task.slope = numbers[4];
  task.has_alpha = numbers[5] >= 0.0;
  task.alpha = task.has_alpha ? numbers[5] : 0.0;
  task.importance_clip = numbers[6];
  task.target = static_cast<const int64_t*>(pointers[2]);
  task.keep = static_cast<const uint8_t*>(pointers[3]);
  task.weights = static_cast<const real*>(pointers[4]);
  task.old_logprob = static_cast<const real*>(pointers[5]);
  task.tokens = static_cast<real*>(pointers[6]);
  task.loss = static_cast<real*>(pointers[7]);
  task.gradient = pointers[8];
  task.gradient_stride = sizes[3];
  task.gradient_columns = sizes[1];
  task.gradient_kind = static_cast<GradientKind>(sizes[4]);
  run(task, static_cast<int>(sizes[5]), static_cast<int>(sizes[6]), sizes[7] != 0);
}

}  // namespace

extern "C" void emulated_affine_float(const double* numbers, const int64_t* sizes, void* const* pointers) {
  launch<float>(numbers, sizes, pointers);
}

extern "C" void emulated_affine_double(const double* numbers, const int64_t* sizes, void* const* pointers) {
  launch<double>(numbers, sizes, pointers);
}
