#pragma once

#include "kernels.h"
#include "packed.h"
#include "pool.h"

namespace llmopt {

// y = x · weight + bias for x [count, in] and y [count, out]: chooses the kernel by the number of rows and spreads it
// over the threads of the pool.
void multiply(ThreadPool& pool, const Kernels& kernels, const PackedWeight& weight, Rows rows);

}  // namespace llmopt
