#include "codes.h"

namespace llmopt {

void round_inputs(ThreadPool& pool, const Kernels& kernels, const GPTQBlock& block) {
  pool.run((block.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce,
           [&](int64_t item) { kernels.codes.gptq(block, item * kOutputsAtOnce); });
}

void grid_errors(ThreadPool& pool, const Kernels& kernels, const GridErrors& grid) {
  pool.run((grid.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce,
           [&](int64_t item) { kernels.codes.grid_errors(grid, item * kOutputsAtOnce); });
}

}  // namespace llmopt
