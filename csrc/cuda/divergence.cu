#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "divergence_edge.h"
#include "sdft_kernels/divergence_block.h"

// The affine row kernel of divergence_block.h on CUDA: one cluster of thread blocks a row.
namespace sdft {
namespace {

using scalar::AffineRow;

constexpr int THREADS = 512;

template <int BLOCKS>
struct CudaBlock {
  char* memory;

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int threads() { return THREADS; }
  static __device__ __forceinline__ int blocks() { return BLOCKS; }
  static __device__ __forceinline__ int rank() { return BLOCKS == 1 ? 0 : static_cast<int>(blockIdx.x % BLOCKS); }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void* shared() const { return memory; }

  static __device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
#endif
  }

  // The same place in another block's shared memory.
  template <typename T>
  static __device__ __forceinline__ T* remote(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
    T* address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
    return address;
#else
    return own;
#endif
  }

  // One access a quad. In assembly, since between cluster barriers nvcc 13 splits the store of a float4.
  static __device__ __forceinline__ void store(scalar::Quad<float>* to, const scalar::Quad<float>& value) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(value.at[0]),
                 "f"(value.at[1]), "f"(value.at[2]), "f"(value.at[3])
                 : "memory");
  }

  static __device__ __forceinline__ void store(scalar::Quad<uint16_t>* to, const scalar::Quad<uint16_t>& value) {
    const auto pair = [&](int i) { return value.at[i] | static_cast<unsigned>(value.at[i + 1]) << 16; };
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(pair(0)), "r"(pair(2))
                 : "memory");
  }

  template <typename T>
  static __device__ __forceinline__ T shuffle(const T& value, int mask) {
    static_assert(sizeof(T) % sizeof(float) == 0);
    float words[sizeof(T) / sizeof(float)];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (float& word : words) {
      word = __shfl_xor_sync(0xffffffffu, word, mask);
    }
    T partner = value;
    memcpy(&partner, words, sizeof(T));
    return partner;
  }
};

template <int BLOCKS, bool RESIDENT>
__global__ void __launch_bounds__(THREADS, 2) affine_kernel(const __grid_constant__ DivergenceTask<float> task) {
  extern __shared__ __align__(16) char memory[];
#if __CUDA_ARCH__ >= 900
  constexpr bool RUNS = true;
#else
  constexpr bool RUNS = BLOCKS == 1;  // clusters came with compute capability 9.0; the launcher asks for none before
#endif
  if constexpr (RUNS) {
    CudaBlock<BLOCKS> block{memory};
    scalar::affine_row<RESIDENT>(block, task, static_cast<int64_t>(blockIdx.x) / BLOCKS);
  }
}

void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "divergence_rows_: ", cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name) {
  int device, value;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

template <int BLOCKS, bool RESIDENT>
void launch(const DivergenceTask<float>& task, cudaStream_t stream) {
  const auto kernel = affine_kernel<BLOCKS, RESIDENT>;
  const auto bytes = static_cast<int>(scalar::shared_bytes<float>(task.vocabulary, BLOCKS, RESIDENT));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (BLOCKS > 8) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {BLOCKS, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(task.count * BLOCKS));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = BLOCKS > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, task));
}

// Blocks of the cluster that keeps a row in shared memory: the fewest of which two fit on a multiprocessor, so that one
// row is read while another waits at a barrier, in clusters that every device has (8); else the fewest that fit at all;
// 0 where the row does not fit or the device has no clusters.
int resident_blocks(int64_t vocabulary) {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  constexpr int RESERVED = 1024;  // bytes that the system takes of each block's share
  const int largest = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? scalar::MAX_BLOCKS : 1;
  for (const int share : {2, 1}) {
    for (int blocks = 1; blocks <= largest && (share == 1 || blocks <= 8); blocks *= 2) {
      if (share * (scalar::shared_bytes<float>(vocabulary, blocks, true) + RESERVED) <= most + RESERVED) {
        return blocks;
      }
    }
  }
  return 0;
}

struct CudaRows {
  static void run(const std::string& stage, const DivergenceTask<double>&, int64_t) {
    STD_TORCH_CHECK(false, "divergence_rows_: stage '", stage, "' on CUDA is fp32 only");
  }

  static void run(const std::string& stage, const DivergenceTask<float>& task, int64_t stream_handle) {
    STD_TORCH_CHECK(stage == "affine", "divergence_rows_: stage '", stage,
                    "' has no CUDA kernel (callable token losses and vocab_group): use impl='triton'");
    STD_TORCH_CHECK(task.weights && task.tokens && task.loss,
                    "divergence_rows_: an argument of stage 'affine' is missing");
    STD_TORCH_CHECK(task.student.stride % 16 == 0 && task.teacher.stride % 16 == 0,
                    "divergence_rows_: rows must be a multiple of 16 logits apart");
    const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
    if (task.count == 0 || task.vocabulary == 0) {
      return;
    }
    switch (resident_blocks(task.vocabulary)) {
      case 1:
        return launch<1, true>(task, stream);
      case 2:
        return launch<2, true>(task, stream);
      case 4:
        return launch<4, true>(task, stream);
      case 8:
        return launch<8, true>(task, stream);
      case 16:
        return launch<16, true>(task, stream);
      default:
        return launch<1, false>(task, stream);
    }
  }
};

}  // namespace
}  // namespace sdft

STABLE_TORCH_LIBRARY_IMPL(sdft_kernels, CUDA, m) {
  m.impl("divergence_rows_", TORCH_BOX(&sdft::edge::divergence_rows<sdft::CudaRows>));
}
