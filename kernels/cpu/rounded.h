// Activations rounded to 8 bits, in memory that is kept from call to call.
#pragma once

#include "buffer.h"
#include "integer_weight.h"

namespace llmopt {

class RoundedRows {
 public:
  // Rounds `rows` rows as the weight wants to meet them; the rows' order and norm are in `input`.
  void fill(ThreadPool& pool, const IntegerKernels& kernels, const IntegerWeight& weight, RoundingInput input,
            int64_t rows);

  // Whether what fill() made for one weight serves another.
  static bool same(const IntegerWeight& a, const IntegerWeight& b);

  const Rounded& view() const { return view_; }

 private:
  Rounded view_{};
  Buffer<uint32_t> codes_;
  Buffer<float> scales_, totals_;
  Buffer<int32_t> sums_;
};

// Whether so many rows go into wide blocks.
bool is_wide(const IntegerKernels& kernels, int64_t rows);

// Rows of a block for so many rows in all: narrow blocks are as full as registers allow, and evenly filled.
int64_t rows_of_block(const IntegerKernels& kernels, int64_t rows, bool wide);

}  // namespace llmopt
