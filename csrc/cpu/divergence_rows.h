#pragma once

#include "isa.h"
#include "sdft_kernels/divergence_task.h"

#define SDFT_DECLARE_DIVERGENCE(real)                                                            \
  SDFT_DECLARE(void affine_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end))   \
  SDFT_DECLARE(void stats_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end))    \
  SDFT_DECLARE(void gradient_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end)) \
  SDFT_DECLARE(void partial_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end))  \
  SDFT_DECLARE(void mixture_rows(const DivergenceTask<real>& task, int64_t begin, int64_t end))

SDFT_DECLARE_DIVERGENCE(float)
SDFT_DECLARE_DIVERGENCE(double)
#undef SDFT_DECLARE_DIVERGENCE
