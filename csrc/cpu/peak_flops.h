#pragma once

#include <cstdint>

#include "isa.h"

// Runs `steps` rounds of independent multiply-adds in registers alone, by VDPBF16PS (`bf16`; only where isa() is
// avx512_bf16) or in fp32. Returns the FLOP done; `sink` takes the sums, without which there would be nothing to do.
SDFT_DECLARE(double multiply_adds(int64_t steps, bool bf16, float* sink))
