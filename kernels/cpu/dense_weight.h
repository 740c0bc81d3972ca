// A floating-point weight in the layout of the dense kernels.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "dense.h"
#include "integer.h"

namespace llmopt {

struct Fp8Input {
  const uint8_t* codes;  // [out][in]: finite e4m3 numbers
  const float* scales;   // [out]
  bool rows_in_fp8;      // the rows that it meets are rounded to e4m3, each with a scale of its own; else to bfloat16
};

class DenseWeight {
 public:
  // values [out][in] are bfloat16 or float16 bits; bias [out] or null. For bfloat16 `in` must be even.
  DenseWeight(const uint16_t* values, bool bfloat16, const float* bias, int64_t out, int64_t in);
  // `in` must be even.
  DenseWeight(const Fp8Input& input, const float* bias, int64_t out, int64_t in);

  const DenseView& view() const { return view_; }
  int64_t out() const { return view_.out; }
  int64_t in() const { return view_.in; }
  int64_t tiles() const { return (view_.out + kTile - 1) / kTile; }
  int64_t bytes() const {
    return static_cast<int64_t>(values_.bytes() + fp8_.bytes() + scales_.bytes() + bias_.bytes());
  }

 private:
  DenseView view_{};
  Buffer<uint16_t> values_;
  Buffer<uint8_t> fp8_;
  Buffer<float> scales_, bias_;
};

}  // namespace llmopt
