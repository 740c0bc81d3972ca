// The kernels themselves, written once in the compiler's vector types. Each instruction set's file defines, in an
// anonymous namespace before it includes this one:
//
//   kVectorBytes             the width of a register
//   kPanelRows               rows of x whose results stay in registers, for two columns of vectors
//   kActivationOffset        what dot() expects to have been added to the codes of x
//   Words, Ints, Floats      vectors of uint32_t, int32_t and float
//   to_float<kBits>(w, j)    code j of each word
//   dot(sum, x, w)           sum + the product of four codes of x (one word) and four of w, lane by lane
//
// Everything is in the anonymous namespace: see kernels.h for why.

#include "vector_math.h"
#include "fp8_impl.h"
#include "integer_impl.h"
#include "dense_impl.h"
#include "gram_impl.h"

namespace llmopt {
namespace {

constexpr int kPanelColumns = 2;
constexpr int64_t kPanelTiles = kParts == 1 ? kPanelColumns : 1;
constexpr int64_t kFusedRows = kParts == 1 ? 8 : 4;

inline Floats bias_of(const WeightView& weight, int64_t output) {
  return weight.bias ? load<Floats>(weight.bias + output) : Floats{};
}

// One group's zero points less the middle code.
inline Floats zeros_at(const WeightView& weight, int64_t index) {
  return to_floats(widened(weight.zeros + index) - weight.middle);
}

// One tile times kRows rows. A zero point is subtracted from the codes, which is exact, before they meet x; a group's
// scale comes in once, at its end.
template <int kBits, bool kZeros, int kRows>
void fused_tile(const WeightView& weight, int64_t tile, const Rows& rows) {
  constexpr int kCodes = 32 / kBits;
  constexpr int kFree = 8 / (kParts * kRows);  // independent sums hide the latency of an addition
  constexpr int kChains = kFree >= 4 ? 4 : kFree >= 2 ? 2 : 1;
  const int64_t group_words = weight.in / kCodes / weight.groups;
  const uint32_t* words = weight.words + tile * (weight.in / kCodes) * kTile;
  const float* x = rows.x;
  Floats total[kRows][kParts] = {};
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t at = (tile * weight.groups + group) * kTile;
    Floats sum[kRows][kParts][kChains] = {}, zero[kParts] = {};
    if constexpr (kZeros) {
      for (int part = 0; part < kParts; ++part) zero[part] = zeros_at(weight, at + part * kLanes);
    }
    for (int64_t i = 0; i < group_words; ++i, words += kTile, x += kCodes) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Words word = load<Words>(words + part * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kCodes; ++j) {
          Floats code = to_float<kBits>(word, j);
          if constexpr (kZeros) code -= zero[part];
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) sum[row][part][j % kChains] += code * x[row * rows.x_stride + j];
        }
      }
    }
    for (int part = 0; part < kParts; ++part) {
      const Floats scale = load<Floats>(weight.scales + at + part * kLanes);
      for (int row = 0; row < kRows; ++row) {
        Floats all = sum[row][part][0];
        for (int chain = 1; chain < kChains; ++chain) all += sum[row][part][chain];
        total[row][part] += scale * all;
      }
    }
  }
  for (int part = 0; part < kParts; ++part) {
    const int64_t output = tile * kTile + part * kLanes;
    const Floats bias = bias_of(weight, output);
    for (int row = 0; row < kRows; ++row) {
      store(rows.y + row * rows.y_stride + output, total[row][part] + bias, weight.out - output);
    }
  }
}

template <int kBits, bool kZeros, int kRows = kFusedRows>
void fused_rows(const WeightView& weight, Tiles tiles, const Rows& rows) {
  if constexpr (kRows > 1) {
    if (rows.count < kRows) return fused_rows<kBits, kZeros, kRows - 1>(weight, tiles, rows);
  }
  for (int64_t tile = tiles.first; tile < tiles.last; ++tile) fused_tile<kBits, kZeros, kRows>(weight, tile, rows);
}

void fused(const WeightView& weight, Tiles tiles, const Rows& rows) {
  if (weight.bits == 4) {
    weight.zeros ? fused_rows<4, true>(weight, tiles, rows) : fused_rows<4, false>(weight, tiles, rows);
  } else {
    weight.zeros ? fused_rows<8, true>(weight, tiles, rows) : fused_rows<8, false>(weight, tiles, rows);
  }
}

// Dequantizes one tile to floats [in][16].
template <int kBits>
void unpack_tile(const WeightView& weight, int64_t tile, float* panel) {
  constexpr int kCodes = 32 / kBits;
  const int64_t group_words = weight.in / kCodes / weight.groups;
  const uint32_t* words = weight.words + tile * (weight.in / kCodes) * kTile;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t at = (tile * weight.groups + group) * kTile;
    Floats scale[kParts], zero[kParts];
    for (int part = 0; part < kParts; ++part) {
      scale[part] = load<Floats>(weight.scales + at + part * kLanes);
      zero[part] = weight.zeros ? zeros_at(weight, at + part * kLanes) : Floats{};
    }
    for (int64_t i = 0; i < group_words; ++i, words += kTile, panel += kCodes * kTile) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Words word = load<Words>(words + part * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < kCodes; ++j) {
          const Floats value = (to_float<kBits>(word, j) - zero[part]) * scale[part];
          std::memcpy(panel + j * kTile + part * kLanes, &value, sizeof value);
        }
      }
    }
  }
}

// kRows rows times kColumns vectors of a panel. `column` counts vectors from the panel's first.
template <int kRows, int kColumns>
void panel_block(const WeightView& weight, const float* panel, int64_t first_tile, int column, const Rows& rows,
                 int64_t first_row) {
  const float* from[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    from[c] = panel + (column + c) / kParts * weight.in * kTile + (column + c) % kParts * kLanes;
  }
  const float* x = rows.x + first_row * rows.x_stride;
  const int64_t stride = rows.x_stride;
  Floats sum[kRows][kColumns] = {};
  for (int64_t i = 0; i < weight.in; ++i) {
    Floats value[kColumns];
    for (int c = 0; c < kColumns; ++c) value[c] = load<Floats>(from[c] + i * kTile);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      for (int c = 0; c < kColumns; ++c) sum[row][c] += value[c] * x[row * stride + i];
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const int64_t output = first_tile * kTile + (column + c) * kLanes;
    const Floats bias = bias_of(weight, output);
    for (int row = 0; row < kRows; ++row) {
      store(rows.y + (first_row + row) * rows.y_stride + output, sum[row][c] + bias, weight.out - output);
    }
  }
}

// The same for integers: exact sums of products of 8-bit codes, then both scales.
template <int kRows, int kColumns>
void integer_block(const WeightView& weight, const uint8_t* codes, const float* row_scales, int64_t first_tile,
                   int column, const Rows& rows, int64_t first_row) {
  const int64_t words = weight.in / 4;
  const uint32_t* from[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    from[c] = weight.words + (first_tile + (column + c) / kParts) * words * kTile + (column + c) % kParts * kLanes;
  }
  const uint8_t* x = codes + first_row * weight.in;
  Ints sum[kRows][kColumns] = {};
  for (int64_t i = 0; i < words; ++i) {
    Words value[kColumns];
    for (int c = 0; c < kColumns; ++c) value[c] = load<Words>(from[c] + i * kTile);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const uint32_t four = load<uint32_t>(x + row * weight.in + i * 4);
      for (int c = 0; c < kColumns; ++c) sum[row][c] = dot(sum[row][c], four, value[c]);
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const int64_t output = first_tile * kTile + (column + c) * kLanes;
    const Floats bias = bias_of(weight, output), scale = load<Floats>(weight.scales + output);
    const Ints offset = load<Ints>(weight.sums + output) * kActivationOffset;
    for (int row = 0; row < kRows; ++row) {
      const Floats product = __builtin_convertvector(sum[row][c] - offset, Floats);
      store(rows.y + (first_row + row) * rows.y_stride + output,
            product * row_scales[first_row + row] * scale + bias, weight.out - output);
    }
  }
}

// Calls block.run<rows, columns>(column, first row) over all rows and columns, in blocks that fit the registers. Rows
// are spread evenly: 16 become 8 + 8, not 12 + 4.
template <int kRows, class Block>
void blocks_of(const Block& block, int64_t rows, int64_t columns) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return blocks_of<kRows - 1>(block, rows, columns);
  }
  const int64_t count = (rows + kRows - 1) / kRows;
  if constexpr (kRows > 1) {
    if ((rows + count - 1) / count < kRows) return blocks_of<kRows - 1>(block, rows, columns);
  }
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t from = row + kRows <= rows ? row : rows - kRows;  // the last block may repeat some rows
    int64_t column = 0;
    for (; column + kPanelColumns <= columns; column += kPanelColumns) {
      block.template run<kRows, kPanelColumns>(column, from);
    }
    if (column < columns) block.template run<kRows, 1>(column, from);
  }
}

struct PanelBlocks {
  const WeightView& weight;
  const float* panel;
  int64_t first_tile;
  const Rows& rows;
  template <int kRows, int kColumns>
  void run(int64_t column, int64_t row) const {
    panel_block<kRows, kColumns>(weight, panel, first_tile, static_cast<int>(column), rows, row);
  }
};

struct IntegerBlocks {
  const WeightView& weight;
  const uint8_t* codes;
  const float* row_scales;
  int64_t first_tile;
  const Rows& rows;
  template <int kRows, int kColumns>
  void run(int64_t column, int64_t row) const {
    integer_block<kRows, kColumns>(weight, codes, row_scales, first_tile, static_cast<int>(column), rows, row);
  }
};

void panels(const WeightView& weight, Tiles tiles, const Rows& rows, float* panel) {
  for (int64_t first = tiles.first; first < tiles.last; first += kPanelTiles) {
    const int64_t last = first + kPanelTiles < tiles.last ? first + kPanelTiles : tiles.last;
    for (int64_t tile = first; tile < last; ++tile) {
      float* to = panel + (tile - first) * weight.in * kTile;
      weight.bits == 4 ? unpack_tile<4>(weight, tile, to) : unpack_tile<8>(weight, tile, to);
    }
    blocks_of<kPanelRows>(PanelBlocks{weight, panel, first, rows}, rows.count, (last - first) * kParts);
  }
}

void integers(const WeightView& weight, Tiles tiles, const Rows& rows, const uint8_t* codes, const float* row_scales) {
  for (int64_t first = tiles.first; first < tiles.last; first += kPanelTiles) {
    const int64_t last = first + kPanelTiles < tiles.last ? first + kPanelTiles : tiles.last;
    const IntegerBlocks block{weight, codes, row_scales, first, rows};
    blocks_of<kPanelRows>(block, rows.count, (last - first) * kParts);
  }
}

float round_row(const float* x, int64_t count, uint8_t* codes) {
  float largest = 0, broken = 0;  // `broken` becomes NaN where the row holds an infinity or a NaN
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    broken += x[i] * 0;
  }
  if (broken != 0) {
    std::memset(codes, kActivationOffset, static_cast<size_t>(count));
    return broken;  // as a scale it makes the whole row NaN, as it is in the reference
  }
  const float scale = largest == 0 ? 1.0F : largest / 127.0F;
  // rint rounds halves to even, and dividing (not multiplying by the inverse) gives the reference's codes exactly.
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(x[i] / scale)) + kActivationOffset);
  }
  return scale;
}

// Turns scores into exp(score - largest) and returns their sum.
inline float exponentiate(float* scores, int64_t count) {
  float largest = scores[0], total = 0;
  for (int64_t i = 1; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = __builtin_expf(scores[i] - largest);
    total += scores[i];
  }
  return total;
}

// Each key and value is read once for all heads that share it. The order of additions depends on the sequence alone,
// so that a result is the same to the bit whatever else is in the batch.
void attend(const AttentionItem& item, float* scores) {
  const int64_t count = item.last - item.first, dim = item.head_dim;
  const auto row_of = [&](int64_t token) {
    return (item.table[token / item.block_size] * item.block_size + token % item.block_size) * item.stride;
  };
  for (int64_t token = item.first; token < item.last; ++token) {
    const float* key = item.keys + row_of(token);
    for (int64_t head = 0; head < item.heads; ++head) {
      Floats sum{};
      for (int64_t i = 0; i < dim; i += kLanes) {
        sum += load<Floats>(item.queries + head * dim + i) * load<Floats>(key + i);
      }
      scores[head * count + token - item.first] = sum_of(sum) * item.scale;
    }
  }
  std::memset(item.out, 0, static_cast<size_t>(item.heads * dim) * sizeof(float));
  for (int64_t head = 0; head < item.heads; ++head) {
    float* own = scores + head * count;
    const float inverse = 1.0F / exponentiate(own, count);
    for (int64_t i = 0; i < count; ++i) own[i] *= inverse;
  }
  for (int64_t token = item.first; token < item.last; ++token) {
    const float* value = item.values + row_of(token);
    for (int64_t head = 0; head < item.heads; ++head) {
      const Floats weight = broadcast(scores[head * count + token - item.first]);
      float* out = item.out + head * dim;
      for (int64_t i = 0; i < dim; i += kLanes) {
        store(out + i, load<Floats>(out + i) + weight * load<Floats>(value + i), kLanes);
      }
    }
  }
}

}  // namespace
}  // namespace llmopt

#include "cache_numbers_impl.h"
#include "softmax_impl.h"

#include "paged_attention_impl.h"
#include "paged_store_impl.h"
#include "sample_impl.h"
#include "codes_impl.h"

namespace llmopt {
namespace {

constexpr Kernels make_kernels(const char* name, bool (*supported)()) {
  return {name, supported, kFusedRows, kPanelTiles, fused, panels, round_row, integers, attend,
          {rotate_and_store, attend_spans, merge_states, finish}, make_integer_kernels(), make_dense_kernels(),
          make_sample_kernels(), make_gram_kernels(), make_codes_kernels()};
}

}  // namespace
}  // namespace llmopt
