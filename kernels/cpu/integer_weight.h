// A quantized weight in the layout of the integer kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "integer.h"
#include "pool.h"

namespace llmopt {

// Scales or minimums in the canonical form of llmopt.weights.quantized: floats, or small integers or e4m3 numbers times
// factors.
struct NumbersInput {
  const float* floats;   // [out][groups], or null
  const int8_t* bytes;   // [out][groups], or null
  const uint8_t* fp8;    // [out][groups], or null
  const float* factors;  // [out][runs], with bytes or fp8
  int64_t runs;
};

struct IntegerInput {
  const uint8_t* codes;  // [out][in]
  NumbersInput scales, minimums;
  const uint8_t* zeros;  // [out][groups], or null
  const float* bias;     // [out], or null
  const int32_t* order;  // [packed_in]: the input that stands at each packed place, -1 for none; null for as it is
  int64_t out, in, packed_in, groups;
  int bits;         // 2 to 8
  bool fp4;         // 4 bits that are FP4, with neither zeros nor minimums
  bool whole_rows;  // one scale of the activations for each row, as w8a8 means it; else one for each step
  int64_t longest_step;  // inputs of a step, which is a group or a part of one
};

class IntegerWeight {
 public:
  IntegerWeight(ThreadPool& pool, const IntegerInput& input);

  const IntegerView& view() const { return view_; }
  const std::vector<int32_t>& order() const { return order_; }
  int64_t out() const { return view_.out; }
  int64_t in() const { return in_; }
  int64_t tiles() const { return (view_.out + kTile - 1) / kTile; }
  int64_t bytes() const;

 private:
  struct Numbers {
    Buffer<uint16_t> halves;
    Buffer<float> floats, factors;
    Buffer<int8_t> bytes;
    Buffer<uint8_t> fp8;
    // All of them times `unit`, a power of two.
    GroupNumbers pack(const NumbersInput& input, int64_t out, int64_t groups, float unit);
    size_t size() const { return halves.bytes() + floats.bytes() + factors.bytes() + bytes.bytes() + fp8.bytes(); }
  };

  void pack_codes(ThreadPool& pool, const IntegerInput& input);

  int64_t in_;
  IntegerView view_{};
  std::vector<int32_t> order_;
  Buffer<uint32_t> words_;
  Numbers scales_, minimums_;
  Buffer<uint8_t> zeros_;
  Buffer<float> bias_;
};

}  // namespace llmopt
