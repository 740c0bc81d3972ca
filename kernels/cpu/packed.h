// A quantized weight in the layout of the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace llmopt {

// What is packed: a weight [out, in] in codes, in the canonical form of llmopt.weights.quantized.
struct PackingInput {
  const uint8_t* codes;  // [out][in]
  const float* scales;   // [out][groups]
  const uint8_t* zeros;  // [out][groups], or null
  const float* bias;     // [out], or null
  const int32_t* order;  // [packed_in]: the input that stands at each packed place, -1 for none; null for as it is
  int64_t out, in, packed_in, groups;
  int bits;               // 2 to 8
  bool integer_activations;  // x is rounded to 8 bits, row by row, before it is multiplied
};

class PackedWeight {
 public:
  explicit PackedWeight(const PackingInput& input);

  WeightView view() const;
  int64_t out() const { return out_; }
  int64_t in() const { return in_; }
  int64_t tiles() const { return (out_ + kTile - 1) / kTile; }
  bool integer_activations() const { return sums_.size() > 0; }
  const std::vector<int32_t>& order() const { return order_; }
  int64_t bytes() const;

 private:
  void pack_codes(const PackingInput& input);
  void pack_groups(const PackingInput& input);

  int64_t out_, in_, packed_in_, groups_;
  int stored_bits_, middle_;
  std::vector<int32_t> order_;
  Buffer<uint32_t> words_;
  Buffer<float> scales_, bias_;
  Buffer<uint8_t> zeros_;
  Buffer<int32_t> sums_;
};

}  // namespace llmopt
