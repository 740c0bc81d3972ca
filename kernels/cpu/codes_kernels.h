// What the choice of codes needs of an instruction set. Included by kernels.h.
#pragma once

#include <cstdint>

namespace llmopt {

constexpr int64_t kOutputsAtOnce = 64;  // that one call rounds: their errors of a block stay in the first-level cache

// Inputs first .. last - 1, of a block that begins at `start`; all arrays are contiguous.
struct GPTQBlock {
  const float* weight;   // [inputs, outputs], with the errors of earlier blocks taken off
  const float* factor;   // [inputs, inputs], upper triangular
  const int64_t* group;  // [inputs]
  const float* scale;    // [groups, outputs]
  const float* zero;     // [groups, outputs], whole numbers
  float* numbers;        // [inputs, outputs]: what is chosen, 0 .. largest
  float* errors;         // [inputs of the block, outputs]; those before `first` are there already
  int64_t inputs, outputs, start, first, last;
  float largest;
};

// What rounding each group of a weight to a grid costs; all arrays are contiguous.
struct GridErrors {
  const float* weight;      // [outputs, groups, size]
  const float* scale;       // [outputs, groups]
  const float* zero;        // [outputs, groups], whole numbers of 0 .. largest
  const float* importance;  // [groups, size], or null where all are alike
  float* errors;            // [outputs, groups, size]: what each becomes less what it was; or null
  float* losses;            // [outputs, groups]: the sum of importance · error²; or null
  int64_t outputs, groups, size;
  float largest;
};

struct CodesKernels {
  // Outputs `output` .. output + kOutputsAtOnce - 1, as far as there are so many.
  void (*gptq)(const GPTQBlock&, int64_t output);
  void (*grid_errors)(const GridErrors&, int64_t output);
};

}  // namespace llmopt
