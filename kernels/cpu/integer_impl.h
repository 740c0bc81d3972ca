// The integer kernels, written once in the compiler's vector types. Beyond vector_math.h they ask each instruction set
// for
//
//   kBlockRows                rows whose sums stay in registers, for kTilesTogether tiles
//   kTilesTogether            1 or 2
//   dot_unsigned(sum, w, x)   sum + four unsigned codes of w times four signed ones of x (one word), lane by lane
//   PairSums                  kUseful: whether sums of pairs of products are faster in 16 bits, as long as they fit; then
//                             add(w, x) adds as dot_unsigned does, and total() is the sum in 32 bits
//   half_to_float(from)       kLanes float16 at an address
//   widened(from)             kLanes integers of 8 or 16 bits at an address, in 32
//   store_bytes(to, w)        the lowest 8 bits of each word; store_halves: 16
//   look_up_bytes(table, w)   the entries of a table of 16 bytes that the bytes of w, all below 16, name
//
// The order of floating-point additions is that of the inputs, whatever the number of rows: a row's result does not
// depend on its neighbours.

#include "integer.h"
#include "rounding_impl.h"

namespace llmopt {
namespace {

// A tile's scales or minimums, one group after the other: a division for each would cost as much as its products.
class NumbersOf {
 public:
  NumbersOf(const GroupNumbers& numbers, int64_t tile, int64_t groups, int64_t group = 0)
      : numbers_(numbers),
        at_((tile * groups + group) * kTile),
        factor_at_((tile * (groups / numbers.run) + group / numbers.run) * kTile),
        left_(numbers.run - group % numbers.run) {}

  Floats part(int part) const {
    const int64_t at = at_ + part * kLanes;
    if (numbers_.halves) return half_to_float(numbers_.halves + at);
    if (numbers_.floats) return load<Floats>(numbers_.floats + at);
    const Floats values = numbers_.fp8 ? fp8_parts(numbers_.fp8 + at) : to_floats(widened(numbers_.bytes + at));
    return values * load<Floats>(numbers_.factors + factor_at_ + part * kLanes);
  }

  void next() {
    at_ += kTile;
    if (--left_ > 0) return;
    factor_at_ += kTile;
    left_ = numbers_.run;
  }

 private:
  const GroupNumbers& numbers_;
  int64_t at_, factor_at_, left_;  // left: groups that share the factor from here on
};

// Unsigned bytes of four consecutive inputs: part(from, v) are the v-th four of those that words hold together. kMiddle
// is what stands for 0 in a symmetric weight, and middle() that times what 8 times is given.
template <Stored kStored>
struct Unpacked;

template <>
struct Unpacked<Stored::k4Bits> {
  static constexpr int kWords = 1, kVectors = 2, kMiddle = 8, kLargest = 15;
  static int32_t middle(int32_t eightfold) { return eightfold; }
  static Words part(const uint32_t* from, int v) { return (load<Words>(from) >> (4 * v)) & 0x0F0F0F0FU; }
};

// Twice the number, plus the middle.
template <>
struct Unpacked<Stored::kFp4> {
  static constexpr int kWords = 1, kVectors = 2, kMiddle = 12, kLargest = 24;
  static int32_t middle(int32_t eightfold) { return eightfold + eightfold / 2; }
  static Words part(const uint32_t* from, int v) {
    static constexpr uint8_t kDoubled[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    return look_up_bytes(kDoubled, Unpacked<Stored::k4Bits>::part(from, v));
  }
};

template <>
struct Unpacked<Stored::k6Bits> {
  static constexpr int kWords = 3, kVectors = 4, kMiddle = 32, kLargest = 63;
  static int32_t middle(int32_t eightfold) { return eightfold * 4; }
  static Words part(const uint32_t* from, int v) {
    const Words low = (load<Words>(from + v / 2 * kTile) >> (4 * (v % 2))) & 0x0F0F0F0FU,
                high = load<Words>(from + 2 * kTile);
    return low | ((v < 2 ? high << (4 - 2 * v) : high >> (2 * v - 4)) & 0x30303030U);
  }
};

template <>
struct Unpacked<Stored::k8Bits> {
  static constexpr int kWords = 1, kVectors = 1, kMiddle = 128, kLargest = 255;
  static int32_t middle(int32_t eightfold) { return eightfold * 16; }
  static Words part(const uint32_t* from, int) { return load<Words>(from); }
};

// What a zero point or a minimum adds to every input.
inline Floats offset_at(const TileOf& own, int64_t group, int part, Floats scale, const NumbersOf& minimums) {
  const IntegerView& weight = *own.weight;
  if (!weight.zeros) return minimums.part(part);
  return -scale * to_floats(widened(weight.zeros + (own.tile * weight.groups + group) * kTile + part * kLanes));
}

constexpr int64_t kStreamedRows = 2;
constexpr int64_t kAhead = 256;  // words: the memory's latency, at the speed at which one row reads it

template <int kBits>
inline void add_products(Ints& sum, Words bytes, uint32_t x) {
  sum = dot_unsigned<kBits>(sum, bytes, x);
}

template <int kBits, class Pairs>
inline void add_products(Pairs& sum, Words bytes, uint32_t x) {
  sum.add(bytes, x);
}

// kTiles tiles, of one weight or of two of the same kind, times the first kRows rows of a block. Several tiles at once
// halve what is loaded of x for each product.
template <Stored kStored, int kTiles, int kRows>
struct TileProduct {
  using Unpack = Unpacked<kStored>;
  static constexpr int kVectors = kTiles * kParts;
  static constexpr bool kFew = kRows * kVectors <= 4;  // sums that would wait for each other
  // So many vectors' sums of pairs fit 16 bits; whole words' or a part of one's.
  static constexpr int kFit = PairSums::kUseful ? 32767 / (2 * 127 * Unpack::kLargest) / 2 * 2 : 0;
  typedef Ints Sums[kVectors][kRows];

  const IntegerView& weight;  // the first, for all that they have in common
  const uint32_t* words[kTiles];
  const uint32_t* codes;
  int64_t stride;
  int64_t ahead;  // words from these tiles to those that come next; 0 where they are on their way already

  // Asks for what is read later. One row reads as fast as memory gives. More rows go over the same tiles block by block,
  // and meanwhile the next tiles can come into the second-level cache: the processor does not foresee them by itself,
  // and memory and arithmetic would take turns.
  inline __attribute__((always_inline)) void fetch(const uint32_t* from) {
#pragma GCC unroll 4
    for (int word = 0; word < Unpack::kWords; ++word) {
      if constexpr (kRows <= kStreamedRows) {
        __builtin_prefetch(from + word * kTile + kAhead);
      } else {
        __builtin_prefetch(from + word * kTile + ahead, 0, 2);
      }
    }
  }

  // Vectors first .. first + count - 1 of the inputs that words hold next, and on to those after them where these were
  // the last.
  template <class Sum>
  inline __attribute__((always_inline)) void take(Sum (&sum)[kVectors][kRows], int first = 0,
                                                  int count = Unpack::kVectors) {
#pragma GCC unroll 4
    for (int v = first; v < first + count; ++v) {
#pragma GCC unroll 4
      for (int column = 0; column < kVectors; ++column) {
        const uint32_t* from = words[column / kParts] + column % kParts * kLanes;
        if (v == 0) fetch(from);
        const Words bytes = Unpack::part(from, v);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          add_products<bits_of(kStored)>(sum[column][row], bytes, codes[v * stride + row]);
        }
      }
    }
    if (first + count < Unpack::kVectors) return;
    for (int tile = 0; tile < kTiles; ++tile) words[tile] += Unpack::kWords * kTile;
    codes += Unpack::kVectors * stride;
  }

  // Adds up in 16 bits what fits them.
  template <class Pairs>
  inline __attribute__((always_inline)) void take_pairs(Sums& sum, int64_t parts) {
    constexpr int kOnce = kFit < Unpack::kVectors ? kFit : Unpack::kVectors, kTakes = kFit / kOnce;
    for (; parts > 0; parts -= kTakes) {
#pragma GCC unroll 4
      for (int first = 0; first < Unpack::kVectors; first += kOnce) {
        Pairs pairs[kVectors][kRows] = {};
        const int64_t takes = parts < kTakes ? parts : kTakes;
#pragma GCC unroll 1
        for (int64_t i = 0; i < takes; ++i) take(pairs, first, kOnce);
#pragma GCC unroll 4
        for (int column = 0; column < kVectors; ++column) {
#pragma GCC unroll 16
          for (int row = 0; row < kRows; ++row) sum[column][row] += pairs[column][row].total();
        }
      }
    }
  }

  // One step's sums, from what the zero point of a symmetric weight takes away on.
  inline __attribute__((always_inline)) void step(Sums& sum, const int32_t* row_sums, bool symmetric, int64_t parts) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Ints start = Ints{} + (symmetric ? Unpack::middle(row_sums[row]) : 0);
#pragma GCC unroll 4
      for (int column = 0; column < kVectors; ++column) sum[column][row] = start;
    }
    if constexpr (kFit > 0) return take_pairs<PairSums>(sum, parts);
    if constexpr (kFew) {  // whole numbers add up in any order
      Sums other = {};
      for (; parts >= 2; parts -= 2) {
        take(sum);
        take(other);
      }
      for (int column = 0; column < kVectors; ++column) {
        for (int row = 0; row < kRows; ++row) sum[column][row] += other[column][row];
      }
    }
    for (; parts > 0; --parts) take(sum);
  }
};

template <Stored kStored, int kTiles, int kRows>
void integer_tiles(const TileOf* tiles, const Rounded& x, int64_t block, float* out) {
  using Product = TileProduct<kStored, kTiles, kRows>;
  using Unpack = typename Product::Unpack;
  const IntegerView& weight = *tiles[0].weight;
  const bool symmetric = !weight.zeros && !weight.minimums.present();
  const int64_t group_steps = weight.steps / weight.groups, stride = x.block_rows;
  const int64_t parts = weight.in / weight.steps / (4 * Unpack::kVectors);
  const int64_t tile_words = weight.in / (4 * Unpack::kVectors) * Unpack::kWords * kTile;
  const bool neighbours = tiles[0].weight == tiles[kTiles - 1].weight;
  Product product{weight, {}, x.codes + block * (weight.in / 4) * stride, stride,
                  block == 0 ? (neighbours ? kTiles : 1) * tile_words : 0};
  for (int t = 0; t < kTiles; ++t) product.words[t] = tiles[t].weight->words + tiles[t].tile * tile_words;
  int64_t row_at = block * weight.steps * stride;
  Floats total[Product::kVectors][kRows] = {};
  const TileOf &one = tiles[0], &other = tiles[kTiles - 1];
  NumbersOf scales[] = {{one.weight->scales, one.tile, weight.groups},
                        {other.weight->scales, other.tile, weight.groups}};
  NumbersOf minimums[] = {{one.weight->minimums, one.tile, weight.groups},
                          {other.weight->minimums, other.tile, weight.groups}};
  for (int64_t group = 0; group < weight.groups; ++group) {
    Floats scale[Product::kVectors], offset[Product::kVectors] = {};
#pragma GCC unroll 4
    for (int c = 0; c < Product::kVectors; ++c) {
      scale[c] = scales[c / kParts].part(c % kParts);
      if (!symmetric) {
        offset[c] = offset_at(tiles[c / kParts], group, c % kParts, scale[c], minimums[c / kParts]);
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      scales[t].next();
      minimums[t].next();
    }
    for (int64_t step = 0; step < group_steps; ++step, row_at += stride) {
      typename Product::Sums sum;
      product.step(sum, x.sums + row_at, symmetric, parts);
#pragma GCC unroll 4
      for (int c = 0; c < Product::kVectors; ++c) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          total[c][row] += to_floats(sum[c][row]) * (scale[c] * x.scales[row_at + row]);
        }
      }
      if (symmetric) continue;
#pragma GCC unroll 4
      for (int c = 0; c < Product::kVectors; ++c) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) total[c][row] += offset[c] * x.totals[row_at + row];
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Product::kVectors; ++c) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(out + ((c / kParts) * kRows + row) * kTile + c % kParts * kLanes, total[c][row], kLanes);
    }
  }
}

template <Stored kStored, int kTiles, int kRows = kBlockRows>
void integer_rows(const TileOf* tiles, const Rounded& x, int64_t block, int64_t rows, float* out) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return integer_rows<kStored, kTiles, kRows - 1>(tiles, x, block, rows, out);
  }
  integer_tiles<kStored, kTiles, kRows>(tiles, x, block, out);
}

template <Stored kStored>
void integer_count(const TileOf* tiles, int64_t count, const Rounded& x, int64_t block, int64_t rows, float* out) {
  if constexpr (kTilesTogether > 1) {
    // With few rows nothing is gained, and the memory is read in one run rather than in two.
    if (count == kTilesTogether && rows > kStreamedRows) {
      return integer_rows<kStored, kTilesTogether>(tiles, x, block, rows, out);
    }
  }
  for (int64_t t = 0; t < count; ++t) integer_rows<kStored, 1>(tiles + t, x, block, rows, out + t * rows * kTile);
}

void integer_any(const TileOf* tiles, int64_t count, const Rounded& x, int64_t block, float* out) {
  const int64_t rows = x.rows_in(block);
  switch (tiles[0].weight->stored) {
    case Stored::k4Bits: return integer_count<Stored::k4Bits>(tiles, count, x, block, rows, out);
    case Stored::k6Bits: return integer_count<Stored::k6Bits>(tiles, count, x, block, rows, out);
    case Stored::k8Bits: return integer_count<Stored::k8Bits>(tiles, count, x, block, rows, out);
    case Stored::kFp4: return integer_count<Stored::kFp4>(tiles, count, x, block, rows, out);
  }
}

void write_tile(const float* tile, const float* bias, float* y, int64_t y_stride, int64_t rows, int64_t count,
                bool add) {
  for (int64_t row = 0; row < rows; ++row, y += y_stride, tile += kTile) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = part * kLanes;
      Floats value = load<Floats>(tile + at);
      if (bias) value += load<Floats>(bias + at);
      if (add) value += load_some(y + at, count - at);
      store(y + at, value, count - at);
    }
  }
}

void write_silu(const float* gate, const float* gate_bias, const float* up, const float* up_bias, float* y,
                int64_t y_stride, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row, y += y_stride, gate += kTile, up += kTile) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = part * kLanes;
      Floats g = load<Floats>(gate + at), u = load<Floats>(up + at);
      if (gate_bias) g += load<Floats>(gate_bias + at);
      if (up_bias) u += load<Floats>(up_bias + at);
      store(y + at, g / (exponential(-g) + 1.0F) * u, count - at);
    }
  }
}

// Products of bytes as fast as they go, with nothing to load: the limit that `integer_tile` is measured against. The
// empty statements keep the compiler from working out beforehand what becomes of x.
int64_t peak(int64_t rounds) {
  constexpr int kSums = 12;
  Ints sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Ints{} + i;  // all different, or one would stand for all
  uint32_t x = 0x01010101U;
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+r"(x));
    const Words codes = Words{} + x;
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = dot_unsigned<4>(sums[i], codes, x);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
  int32_t total = sums[0][0];
  asm volatile("" : "+r"(total));
  return rounds * kSums * kLanes * 4 * 2;
}

}  // namespace
}  // namespace llmopt

#if defined(__AMX_INT8__)
#include "integer_tiles_impl.h"
#else
namespace llmopt {
namespace {
constexpr WideKernels make_wide_kernels() { return {}; }
}  // namespace
}  // namespace llmopt
#endif

namespace llmopt {
namespace {

constexpr IntegerKernels make_integer_kernels() {
  return {kBlockRows, kTilesTogether, round_block, integer_any, write_tile, write_silu, norm_row, peak,
          make_wide_kernels()};
}

}  // namespace
}  // namespace llmopt
