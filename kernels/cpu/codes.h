// How codes are chosen: GPTQ's loop, and what a grid makes of a weight. See llmopt/quant/.
#pragma once

#include "kernels.h"
#include "pool.h"

namespace llmopt {

// Rounds the inputs first .. last - 1 of a block, spreading the outputs over the threads. What the errors of the block
// take from each input is summed in the order of the inputs, whatever the number of threads.
void round_inputs(ThreadPool& pool, const Kernels& kernels, const GPTQBlock& block);

void grid_errors(ThreadPool& pool, const Kernels& kernels, const GridErrors& grid);

}  // namespace llmopt
