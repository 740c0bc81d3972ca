#include "dense_weight.h"

#include "tiles.h"

namespace llmopt {
namespace {

// One number for each output, in whole tiles; nothing where there are none.
Buffer<float> of_outputs(const float* values, int64_t out) {
  return values ? in_tiles(values, out, 1) : Buffer<float>();
}

}  // namespace

DenseWeight::DenseWeight(const uint16_t* values, bool bfloat16, const float* bias, int64_t out, int64_t in)
    : values_(in_tiles(values, out, in, bfloat16 ? 2 : 1)), bias_(of_outputs(bias, out)) {
  view_.pairs = bfloat16 ? reinterpret_cast<const uint32_t*>(values_.data()) : nullptr;
  view_.halves = bfloat16 ? nullptr : values_.data();
  view_.bias = bias_.data();
  view_.out = out;
  view_.in = in;
}

DenseWeight::DenseWeight(const Fp8Input& input, const float* bias, int64_t out, int64_t in)
    : fp8_(in_tiles(input.codes, out, in, 2)), scales_(of_outputs(input.scales, out)), bias_(of_outputs(bias, out)) {
  view_.fp8_pairs = reinterpret_cast<const uint16_t*>(fp8_.data());
  view_.scales = scales_.data();
  view_.bias = bias_.data();
  view_.out = out;
  view_.in = in;
  view_.rows_in_fp8 = input.rows_in_fp8;
}

}  // namespace llmopt
