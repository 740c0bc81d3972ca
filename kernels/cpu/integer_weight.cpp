#include "integer_weight.h"

#include <algorithm>

#include "tiles.h"

namespace llmopt {
namespace {

Stored stored_as(const IntegerInput& input, int64_t group_inputs) {
  if (input.fp4) return Stored::kFp4;
  if (input.bits <= 4) return Stored::k4Bits;
  return input.bits <= 6 && group_inputs % 16 == 0 ? Stored::k6Bits : Stored::k8Bits;
}

int64_t unit_of(int bits) { return bits == 4 ? 8 : bits == 6 ? 16 : 4; }  // inputs that words hold together

int64_t step_of(int64_t group_inputs, int64_t longest, int64_t unit) {
  for (int64_t step = std::min(group_inputs, longest) / unit * unit; step > 0; step -= unit) {
    if (group_inputs % step == 0) return step;
  }
  return group_inputs;
}

constexpr float kFp8Unit = 256;  // kernels read e4m3 numbers as so many times smaller ones

// The words of one output's codes, already without padding: byte j of a word is input j of four.
void pack_unit(int stored, const uint32_t* codes, uint32_t* to) {
  const auto four = [codes](int first, int shift, uint32_t mask) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) word |= (codes[first + j] >> shift & mask) << (8 * j);
    return word;
  };
  if (stored == 8) {
    to[0] = four(0, 0, 0xFF);
  } else if (stored == 4) {
    to[0] = four(0, 0, 0xF) | four(4, 0, 0xF) << 4;
  } else {
    to[0] = four(0, 0, 0xF) | four(4, 0, 0xF) << 4;
    to[kTile] = four(8, 0, 0xF) | four(12, 0, 0xF) << 4;
    to[2 * kTile] = four(0, 4, 3) | four(4, 4, 3) << 2 | four(8, 4, 3) << 4 | four(12, 4, 3) << 6;
  }
}

}  // namespace

GroupNumbers IntegerWeight::Numbers::pack(const NumbersInput& input, int64_t out, int64_t groups, float unit) {
  if (input.factors) {
    factors = in_tiles(input.factors, out, input.runs);
    for (int64_t i = 0; i < factors.size(); ++i) factors[i] *= input.fp8 ? unit * kFp8Unit : unit;
    if (input.fp8) fp8 = in_tiles(input.fp8, out, groups);
    if (input.bytes) bytes = in_tiles(input.bytes, out, groups);
    return {nullptr, nullptr, bytes.data(), fp8.data(), factors.data(), groups / input.runs};
  }
  if (!input.floats) return {};
  floats = in_tiles(input.floats, out, groups);
  for (int64_t i = 0; i < floats.size(); ++i) floats[i] *= unit;
  const bool exact = std::all_of(floats.data(), floats.data() + floats.size(),
                                 [](float value) { return static_cast<float>(static_cast<_Float16>(value)) == value; });
  if (!exact) return {nullptr, floats.data(), nullptr, nullptr, nullptr, 1};
  halves = Buffer<uint16_t>(floats.size());
  for (int64_t i = 0; i < floats.size(); ++i) {
    const auto half = static_cast<_Float16>(floats[i]);
    std::memcpy(halves.data() + i, &half, sizeof half);
  }
  floats = {};
  return {halves.data(), nullptr, nullptr, nullptr, nullptr, 1};
}

IntegerWeight::IntegerWeight(ThreadPool& pool, const IntegerInput& input) : in_(input.in) {
  const int64_t group_inputs = input.packed_in / input.groups;
  const Stored stored = stored_as(input, group_inputs);
  const int64_t unit = unit_of(bits_of(stored));
  const int64_t step = input.whole_rows ? input.packed_in : step_of(group_inputs, input.longest_step, unit);
  if (input.order) order_.assign(input.order, input.order + input.packed_in);
  view_ = {nullptr,
           scales_.pack(input.scales, input.out, input.groups, input.fp4 ? 0.5F : 1.0F),
           minimums_.pack(input.minimums, input.out, input.groups, 1.0F),
           nullptr,
           nullptr,
           input.out,
           input.packed_in,
           input.groups,
           input.packed_in / step,
           stored};
  if (input.zeros) zeros_ = in_tiles(input.zeros, input.out, input.groups);
  if (input.bias) bias_ = in_tiles(input.bias, input.out, 1);
  pack_codes(pool, input);
  view_.words = words_.data();
  view_.zeros = zeros_.data();
  view_.bias = bias_.data();
}

void IntegerWeight::pack_codes(ThreadPool& pool, const IntegerInput& input) {
  const int bits = bits_of(view_.stored);
  const int64_t unit = unit_of(bits), unit_words = bits == 6 ? 3 : 1;
  const int64_t units = input.packed_in / unit;
  const bool symmetric = !input.zeros && !view_.minimums.present();
  const int shift =
      symmetric ? (1 << (bits - 1)) - (1 << (input.bits - 1)) : 0;  // to the middle of what is stored
  words_ = Buffer<uint32_t>(tiles() * units * unit_words * kTile);
  pool.run(tiles(), [&](int64_t tile) {
    for (int64_t lane = 0; lane < kTile && tile * kTile + lane < input.out; ++lane) {
      const uint8_t* codes = input.codes + (tile * kTile + lane) * input.in;
      uint32_t* to = words_.data() + tile * units * unit_words * kTile + lane;
      for (int64_t i = 0; i < units; ++i, to += unit_words * kTile) {
        uint32_t some[16];
        for (int64_t j = 0; j < unit; ++j) {
          const int64_t source = input.order ? input.order[i * unit + j] : i * unit + j;
          some[j] = source < 0 ? 0U : static_cast<uint32_t>(codes[source] + shift);
        }
        pack_unit(bits, some, to);
      }
    }
  });
}

int64_t IntegerWeight::bytes() const {
  return static_cast<int64_t>(words_.bytes() + scales_.size() + minimums_.size() + zeros_.bytes() + bias_.bytes());
}

}  // namespace llmopt
