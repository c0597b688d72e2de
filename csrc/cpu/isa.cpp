#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace sdft {
namespace {

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  return avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

// ATen's switch, so that one setting governs both. "avx512" leaves out VDPBF16PS, so that what processors without it
// run can be tested on one that has it.
Isa allowed() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  if (wish == nullptr) {
    return Isa::avx512_bf16;
  }
  return std::strcmp(wish, "default") == 0  ? Isa::portable
         : std::strcmp(wish, "avx2") == 0   ? Isa::avx2
         : std::strcmp(wish, "avx512") == 0 ? Isa::avx512
                                            : Isa::avx512_bf16;
}

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    const Isa has = supported(), may = allowed();
    return has < may ? has : may;
  }();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace sdft
