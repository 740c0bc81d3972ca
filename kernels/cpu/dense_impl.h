// Products of 16-bit floating-point weights, beyond what integer_impl.h asks for with dot_bfloat16() and
// store_bfloat16() of bfloat16 numbers. Additions follow the order of the inputs, as there.

#include "dense.h"

namespace llmopt {
namespace {

void arrange_block(const RoundingInput& input, const DenseRows& to, int64_t block, float* scratch) {
  const int64_t rows = to.block_rows;
  for (int64_t r = 0; r < rows && block * rows + r < to.rows; ++r) {
    const float* x = arrange_row(input, input.x + (block * rows + r) * input.x_stride, to.in, scratch);
    if (to.values) {
      for (int64_t i = 0; i < to.in; ++i) to.values[(block * to.in + i) * rows + r] = x[i];
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
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const Words high = __builtin_convertvector(load<Halves>(some), Words) << 16;
    store(to + i, bfloat16 ? reinterpret_cast<Floats>(high) : half_to_float(some), left);
  }
}

template <int kRows>
void dense_tile(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, float* out) {
  Floats sum[kRows][kParts] = {};
  if (weight.pairs) {
    const uint32_t* from = weight.pairs + tile * (weight.in / 2) * kTile;
    const uint32_t* pairs = x.pairs + block * (weight.in / 2) * x.block_rows;
    for (int64_t i = 0; i < weight.in / 2; ++i, from += kTile, pairs += x.block_rows) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Words value = load<Words>(from + part * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row)
          sum[row][part] = dot_bfloat16(sum[row][part], value, Words{} + pairs[row]);
      }
    }
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
constexpr DenseKernels make_dense_kernels() { return {kNativeBfloat16, nullptr, nullptr, widen, arrange_block, dense_any}; }
}  // namespace
}  // namespace llmopt
#endif
