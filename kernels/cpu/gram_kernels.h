// What xᵀ x needs of an instruction set. Included by kernels.h.
#pragma once

#include <cstdint>

namespace llmopt {

// Columns of x that lie together, in pairs of rows: [rows / 2][kGramPanel] words of two bfloat16, the first row's in the
// lower half.
// 48 is a multiple of every block of columns and of rows that the instruction sets keep in registers.
constexpr int64_t kGramPanel = 48;

struct GramKernels {
  // The first `columns` <= kGramPanel columns of x [rows, x_stride], padded with zeros to whole pairs and panels.
  void (*arrange)(const float* x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t* panel);
  // sums [kGramPanel][kGramPanel] = aᵀ b of two panels.
  void (*multiply)(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sums);
};

}  // namespace llmopt
