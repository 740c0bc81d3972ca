#include "packed.h"

namespace llmopt {

PackedWeight::PackedWeight(const PackingInput& input)
    : out_(input.out),
      in_(input.in),
      packed_in_(input.packed_in),
      groups_(input.groups),
      stored_bits_(input.bits <= 4 && !input.integer_activations ? 4 : 8),
      middle_(1 << (input.bits - 1)) {
  if (input.order) order_.assign(input.order, input.order + packed_in_);
  pack_codes(input);
  pack_groups(input);
}

void PackedWeight::pack_codes(const PackingInput& input) {
  const int64_t codes_per_word = 32 / stored_bits_, words = packed_in_ / codes_per_word;
  const uint32_t mask = (1U << stored_bits_) - 1;
  words_ = Buffer<uint32_t>(tiles() * words * kTile);
  if (input.integer_activations) sums_ = Buffer<int32_t>(tiles() * kTile);
  for (int64_t output = 0; output < out_; ++output) {
    const uint8_t* codes = input.codes + output * in_;
    uint32_t* to = words_.data() + output / kTile * words * kTile + output % kTile;
    int32_t sum = 0;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t bits = 0;
      for (int64_t j = 0; j < codes_per_word; ++j) {
        const int64_t place = word * codes_per_word + j;
        const int64_t source = input.order ? input.order[place] : place;
        const int code = source < 0 ? 0 : codes[source] - middle_;
        bits |= (static_cast<uint32_t>(code) & mask) << (j * stored_bits_);
        sum += code;
      }
      to[word * kTile] = bits;
    }
    if (input.integer_activations) sums_[output] = sum;
  }
}

void PackedWeight::pack_groups(const PackingInput& input) {
  scales_ = Buffer<float>(tiles() * groups_ * kTile);
  if (input.zeros) zeros_ = Buffer<uint8_t>(tiles() * groups_ * kTile);
  if (input.bias) bias_ = Buffer<float>(tiles() * kTile);
  for (int64_t output = 0; output < out_; ++output) {
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t to = (output / kTile * groups_ + group) * kTile + output % kTile;
      scales_[to] = input.scales[output * groups_ + group];
      if (input.zeros) zeros_[to] = input.zeros[output * groups_ + group];
    }
    if (input.bias) bias_[output] = input.bias[output];
  }
}

WeightView PackedWeight::view() const {
  return {words_.data(), scales_.data(), zeros_.data(), bias_.data(), sums_.data(), out_,
          packed_in_,    groups_,        stored_bits_,  middle_};
}

int64_t PackedWeight::bytes() const {
  return static_cast<int64_t>(words_.bytes() + scales_.bytes() + zeros_.bytes() + bias_.bytes() + sums_.bytes());
}

}  // namespace llmopt
