#pragma once

// Run-time choice between the builds of one kernel source. CMake compiles each file of csrc/cpu/kernels once per
// instruction set, with SDFT_ISA naming it; everything such a file defines lives in `namespace sdft::SDFT_ISA` (or is
// static), so that no inline function compiled for a newer processor can be linked in place of an older one's.

namespace sdft {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The best one that this processor has and ATEN_CPU_CAPABILITY (default | avx2 | avx512) allows; read once.
Isa isa();

// Its name, as in `Isa`.
const char* isa_name();

}  // namespace sdft

// Calls `function(...)` of the best build there is. x86-64 has all of them, other processors the portable one.
#if defined(__x86_64__)
#define SDFT_DISPATCH(function, ...)                                            \
  (::sdft::isa() >= ::sdft::Isa::avx512 ? ::sdft::avx512::function(__VA_ARGS__) \
   : ::sdft::isa() == ::sdft::Isa::avx2 ? ::sdft::avx2::function(__VA_ARGS__)   \
                                        : ::sdft::portable::function(__VA_ARGS__))
// Declares `signature` in the namespace of every build.
#define SDFT_DECLARE(...)    \
  namespace sdft::portable { \
  __VA_ARGS__;               \
  }                          \
  namespace sdft::avx2 {     \
  __VA_ARGS__;               \
  }                          \
  namespace sdft::avx512 {   \
  __VA_ARGS__;               \
  }
#else
#define SDFT_DISPATCH(function, ...) ::sdft::portable::function(__VA_ARGS__)
#define SDFT_DECLARE(...)    \
  namespace sdft::portable { \
  __VA_ARGS__;               \
  }
#endif
