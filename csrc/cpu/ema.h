#pragma once

#include <cstdint>

#include "isa.h"

// Exponential moving averages over elements [begin, end): average += rate * (param - average), in fp32, rate in (0, 1].
// Like torch.lerp, the form changes at rate 0.5, where the one above starts to cancel; rate 1 copies `param` exactly.
// bf16 is given as its bits. Every build gives the same bits: no multiplication is contracted with an addition.

SDFT_DECLARE(void ema_update(float* ema, const float* param, double rate, int64_t begin, int64_t end))
SDFT_DECLARE(void ema_update(float* ema, const uint16_t* param, double rate, int64_t begin, int64_t end))

// The average is high + low: high its bf16, low the bf16 of what that rounds away (about 17 bits together; the sum of
// the two is exact in fp32). Where high is not finite, low is 0, so that the sum is high.
SDFT_DECLARE(void ema_update_hilo(uint16_t* high, uint16_t* low, const float* param, double rate, int64_t begin,
                                  int64_t end))
SDFT_DECLARE(void ema_update_hilo(uint16_t* high, uint16_t* low, const uint16_t* param, double rate, int64_t begin,
                                  int64_t end))
