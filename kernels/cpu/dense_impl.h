// Products of floating-point weights of 16 bits and of FP8, beyond what integer_impl.h asks for with dot_bfloat16() and
// store_bfloat16() of bfloat16 numbers. Additions follow the order of the inputs, as there.

#include <type_traits>

#include "dense.h"

namespace llmopt {
namespace {

// Rounds a row as the reference does, to the bit, and returns its scale. `to` may be x.
inline float round_to_fp8(const float* x, int64_t count, float* to) {
  const float largest = largest_magnitude(x, count) / 448.0F, scale = largest == 0 ? 1.0F : largest;
  for (int64_t i = 0; i < count; i += kLanes) {
    store(to + i, nearest_fp8(load_some(x + i, count - i) / scale), count - i);
  }
  return scale;
}

inline Floats bfloat16_to_float(const uint16_t* from) { return reinterpret_cast<Floats>(widened(from) << 16); }

inline Floats nearest_bfloat16(Floats value) {
  uint16_t halves[kLanes];
  store_bfloat16(halves, value);
  return bfloat16_to_float(halves);
}

void arrange_block(const RoundingInput& input, const DenseRows& to, int64_t block, float* scratch) {
  const int64_t rows = to.block_rows;
  for (int64_t r = 0; r < rows && block * rows + r < to.rows; ++r) {
    const int64_t row = block * rows + r;
    const float* x = arrange_row(input, input.x + row * input.x_stride, to.in, scratch);
    if (to.scales) {
      to.scales[row] = round_to_fp8(x, to.in, scratch);
      x = scratch;
    }
    if (to.values) {
      float* values = to.values + block * to.in * rows + r;
      for (int64_t i = 0; i < to.in; i += kLanes) {
        Floats some = load_some(x + i, to.in - i);
        if (to.bfloat16) some = nearest_bfloat16(some);
        for (int64_t j = 0; j < kLanes && i + j < to.in; ++j) values[(i + j) * rows] = some[j];
      }
      continue;
    }
    for (int64_t i = 0; i < to.in; i += kLanes) {
      uint32_t pairs[kLanes / 2];
      store_bfloat16(pairs, load_some(x + i, to.in - i));
      for (int64_t j = 0; j < kLanes / 2 && i + 2 * j < to.in; ++j) {
        const int64_t pair = i / 2 + j, at = to.wide ? r * (to.in / 2) + pair : pair * rows + r;
        to.pairs[block * (to.in / 2) * rows + at] = pairs[j];
      }
    }
  }
}

void widen(const uint16_t* from, bool bfloat16, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint16_t some[kLanes] = {};
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    std::memcpy(some, from + i, static_cast<size_t>(left) * sizeof(uint16_t));
    store(to + i, bfloat16 ? bfloat16_to_float(some) : half_to_float(some), left);
  }
}

inline Words pairs_at(const uint32_t* from) { return load<Words>(from); }
inline Words pairs_at(const uint16_t* from) { return reinterpret_cast<Words>(fp8_pairs(from)); }

// One tile of bfloat16 or e4m3 pairs [in / 2][16].
template <int kRows, class Pair>
inline void add_pairs(const Pair* from, const uint32_t* x, int64_t pairs, int64_t stride,
                      Floats (&sum)[kRows][kParts]) {
  for (int64_t i = 0; i < pairs; ++i, from += kTile, x += stride) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const Words value = pairs_at(from + part * kLanes);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) sum[row][part] = dot_bfloat16(sum[row][part], value, Words{} + x[row]);
    }
  }
}

// The same where the processor multiplies no pairs: x holds one number after the other. A number of x is loaded for all
// parts at once, or registers would not do.
template <int kRows, class Pair>
inline void add_pairs(const Pair* from, const float* x, int64_t pairs, int64_t stride, Floats (&sum)[kRows][kParts]) {
  const auto add = [&](const Floats(&values)[kParts], const float* numbers) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) sum[row][part] += values[part] * numbers[row];
    }
  };
  for (int64_t i = 0; i < pairs; ++i, from += kTile, x += 2 * stride) {
    Words both[kParts];
    Floats values[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      both[part] = pairs_at(from + part * kLanes);
      values[part] = reinterpret_cast<Floats>(both[part] << 16);
    }
    add(values, x);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) values[part] = reinterpret_cast<Floats>(both[part] & 0xffff0000);
    add(values, x + stride);
  }
}

void expand_fp8_tile(const DenseView& weight, int64_t tile, uint32_t* pairs) {
  const int64_t count = weight.in / 2 * kTile;
  const uint16_t* from = weight.fp8_pairs + tile * count;
  for (int64_t i = 0; i < count; i += kLanes) {
    __builtin_prefetch(from + i + 2 * kAhead);
    const Words value = pairs_at(from + i);
    std::memcpy(pairs + i, &value, sizeof value);
  }
}

template <int kRows>
void dense_tile(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, float* out) {
  Floats sum[kRows][kParts] = {};
  if (weight.takes_pairs()) {
    const int64_t pairs = weight.in / 2;
    using Number = std::conditional_t<kNativeBfloat16, uint32_t, float>;
    const Number* rows;
    if constexpr (kNativeBfloat16) {
      rows = x.pairs + block * pairs * x.block_rows;
    } else {
      rows = x.values + block * weight.in * x.block_rows;
    }
    weight.pairs ? add_pairs(weight.pairs + tile * pairs * kTile, rows, pairs, x.block_rows, sum)
                 : add_pairs(weight.fp8_pairs + tile * pairs * kTile, rows, pairs, x.block_rows, sum);
  } else {
    const uint16_t* from = weight.halves + tile * weight.in * kTile;
    const float* values = x.values + block * weight.in * x.block_rows;
    for (int64_t i = 0; i < weight.in; ++i, from += kTile, values += x.block_rows) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Floats value = half_to_float(from + part * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sum[row][part] += value * values[row];
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int part = 0; part < kParts; ++part) store(out + row * kTile + part * kLanes, sum[row][part], kLanes);
  }
}

template <int kRows = kBlockRows>
void dense_rows(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, int64_t rows, float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dense_rows<kRows - 1>(weight, tile, x, block, rows, out);
  }
  dense_tile<kRows>(weight, tile, x, block, out);
}

void dense_any(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, float* out) {
  const int64_t left = x.rows - block * x.block_rows;
  dense_rows(weight, tile, x, block, left < x.block_rows ? left : x.block_rows, out);
}

}  // namespace
}  // namespace llmopt

#if defined(__AMX_BF16__)
#include "dense_tiles_impl.h"
#else
namespace llmopt {
namespace {
constexpr DenseKernels make_dense_kernels() {
  return {kNativeBfloat16, nullptr, nullptr, widen, arrange_block, expand_fp8_tile, dense_any};
}
}  // namespace
}  // namespace llmopt
#endif
