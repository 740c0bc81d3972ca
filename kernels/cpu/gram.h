// xᵀ x of many rows, as calibration gathers it: what each pair of inputs has in common.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace llmopt {

// Adds xᵀ x to gram [width, width], both float32; x [rows, width] is rounded to bfloat16, sums are float32. Only the
// blocks on and above gram's diagonal are read; those below become their mirror images. Every element is summed in the
// order of the rows, whatever the number of threads.
void add_gram(ThreadPool& pool, const Kernels& kernels, const float* x, int64_t rows, int64_t width, float* gram);

}  // namespace llmopt
