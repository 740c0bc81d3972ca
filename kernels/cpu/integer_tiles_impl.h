// Products of many rows by tile registers (amx.h): 32 rows times 32 outputs at a time. The sums of a step are whole
// numbers, and what becomes of them follows the expressions of integer_impl.h in the same order, so that a row's result
// is the same to the bit as there.

#include "amx.h"

namespace llmopt {
namespace {

constexpr int64_t kWideRows = 2 * kTileRows;
constexpr int64_t kTileWords = kTileRows * kTile;  // of sums
constexpr int kStepsTogether = 4;                  // that are multiplied before their sums are taken up

// The sums of one step, of rows 0 to 15 and 16 to 31 with either tile of outputs.
typedef int32_t StepSums[2][2][kTileWords];

// Whether an expanded code is signed: a symmetric weight's has its middle taken off, so that sums need no correction.
inline bool is_symmetric(const IntegerView& weight) { return !weight.zeros && !weight.minimums.present(); }

// Inputs 4 · first .. 4 · last - 1 of a tile, whole units of its words, a byte each.
template <Stored kStored>
inline void expand_tile(const TileOf& own, int64_t first, int64_t last, uint32_t* codes) {
  using Unpack = Unpacked<kStored>;
  typedef uint8_t WordBytes __attribute__((vector_size(kVectorBytes)));
  const IntegerView& weight = *own.weight;
  const uint32_t* words =
      weight.words + (own.tile * (weight.in / 4) + first) / Unpack::kVectors * Unpack::kWords * kTile;
  const uint8_t taken_off = is_symmetric(weight) ? Unpack::kMiddle : 0;
  const WordBytes middle = WordBytes{} + taken_off;
  for (; first < last; first += Unpack::kVectors, words += Unpack::kWords * kTile) {
#pragma GCC unroll 4
    for (int v = 0; v < Unpack::kVectors; ++v, codes += kTile) {
      const WordBytes bytes = reinterpret_cast<WordBytes>(Unpack::part(words, v)) - middle;
      std::memcpy(codes, &bytes, sizeof bytes);
    }
  }
}

inline void expand_some(const TileOf& own, int64_t first, int64_t last, uint32_t* codes) {
  switch (own.weight->stored) {
    case Stored::k4Bits: return expand_tile<Stored::k4Bits>(own, first, last, codes);
    case Stored::k6Bits: return expand_tile<Stored::k6Bits>(own, first, last, codes);
    case Stored::k8Bits: return expand_tile<Stored::k8Bits>(own, first, last, codes);
    case Stored::kFp4: return expand_tile<Stored::kFp4>(own, first, last, codes);
  }
}

void expand_tiles(const TileOf* tiles, int64_t count, uint32_t* codes) {
  const int64_t words = tiles->weight->in / 4;
  for (int64_t t = 0; t < count; ++t) expand_some(tiles[t], 0, words, codes + t * words * kTile);
}

// The inputs of one product: as many as fit, and divide a step.
inline int64_t chunk_of(const IntegerView& weight) {
  const int64_t step = weight.in / weight.steps;
  int64_t chunk = step < kTileBytes ? step : kTileBytes;
  while (step % chunk) chunk -= 4;
  return chunk;
}

// Up to 32 rows times one or two tiles of outputs.
class WideProduct {
 public:
  WideProduct(const TileOf* tiles, int64_t count, const uint32_t* codes, const Rounded& x, int64_t block, float* out)
      : tiles_(tiles),
        count_(count),
        weight_(*tiles[0].weight),
        rows_(x.rows_in(block)),
        stride_(x.block_rows),
        row_words_(weight_.in / 4),
        chunk_(chunk_of(weight_)),
        x_(x.codes + block * x.block_rows * row_words_),
        scales_(x.scales + block * weight_.steps * stride_),
        totals_(x.totals + block * weight_.steps * stride_),
        codes_(codes),
        out_(out),
        ahead_(codes ? 0 : count > 1 && tiles[0].weight == tiles[1].weight ? 2 : 1) {
    if (!codes) expand(0);
  }

  void run() {
    if (is_symmetric(weight_)) return steps<true, true>();
    weight_.stored != Stored::k8Bits ? steps<false, true>() : steps<false, false>();
  }

 private:
  int64_t rows_in(int half) const { return half ? rows_ - kTileRows : rows_ < kTileRows ? rows_ : kTileRows; }

  template <bool kSymmetric, bool kSigned>
  void steps() {
    alignas(64) StepSums sums[kStepsTogether];
    int64_t step = 0;
    for (; step + kStepsTogether <= weight_.steps; step += kStepsTogether) {
      some_steps<kStepsTogether, kSymmetric, kSigned>(step, sums);
    }
    for (; step < weight_.steps; ++step) some_steps<1, kSymmetric, kSigned>(step, sums);
  }

  template <int kSteps, bool kSymmetric, bool kSigned>
  void some_steps(int64_t first, StepSums* sums) {
    for (int i = 0; i < kSteps; ++i) {
      for (int64_t t = 0; ahead_ > 0 && t < count_; ++t) fetch(tiles_[t], first + i);
      multiply<kSigned>(first + i, sums[i]);
    }
    for (int half = 0; half < 2 && rows_in(half) > 0; ++half) {
      for (int64_t t = 0; t < count_; ++t) take_up<kSteps, kSymmetric>(half, t, first, sums);
    }
  }

  // Begins to bring the same step of the tile that comes next into the second-level cache: the processor itself does
  // not foresee two runs that alternate, and waits.
  void fetch(const TileOf& own, int64_t step) const {
    const int64_t words = row_words_ * bits_of(weight_.stored) / 8 * kTile, step_words = words / weight_.steps;
    const uint32_t* next = own.weight->words + (own.tile + ahead_) * words + step * step_words;
    for (int64_t word = 0; word < step_words; word += kTileBytes / 4) __builtin_prefetch(next + word, 0, 2);
  }

  // The codes of a product's inputs, which begin at `word`, of tile t.
  const uint32_t* codes_at(int64_t t, int64_t word) const {
    if (codes_) return codes_ + (t * row_words_ + word) * kTile;
    return expanded_[word / (chunk_ / 4) % 2][t];
  }

  // Where codes come as they are packed, they are expanded for each product while the one before is computed.
  void expand(int64_t word) {
    if (word >= row_words_) return;
    const int64_t words = chunk_ / 4;
    for (int64_t t = 0; t < count_; ++t) expand_some(tiles_[t], word, word + words, expanded_[word / words % 2][t]);
  }

  // The sums of one step, into memory.
  template <bool kSigned>
  __attribute__((always_inline)) void multiply(int64_t step, StepSums& sums) {
    const int64_t step_words = row_words_ / weight_.steps, words = chunk_ / 4;
    const long x_stride = row_words_ * 4;
    const bool more_rows = rows_ > kTileRows, more_outputs = count_ > 1;
    _tile_zero(0);
    _tile_zero(1);
    if (more_rows) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t word = step * step_words; word < (step + 1) * step_words; word += words) {
      _tile_loadd(6, codes_at(0, word), kTileBytes);
      _tile_loadd(4, x_ + word, x_stride);
      product<kSigned, 0>();
      if (more_outputs) {
        _tile_loadd(7, codes_at(1, word), kTileBytes);
        product<kSigned, 1>();
      }
      if (more_rows) {
        _tile_loadd(5, x_ + kTileRows * row_words_ + word, x_stride);
        product<kSigned, 2>();
        if (more_outputs) product<kSigned, 3>();
      }
      if (!codes_) expand(word + words);
    }
    _tile_stored(0, sums[0][0], kTileBytes);
    if (more_outputs) _tile_stored(1, sums[0][1], kTileBytes);
    if (!more_rows) return;
    _tile_stored(2, sums[1][0], kTileBytes);
    if (more_outputs) _tile_stored(3, sums[1][1], kTileBytes);
  }

  // Tile registers go by literal numbers: 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 outputs. Unsigned codes have 8
  // bits and a zero point or a minimum, which is taken into account afterwards.
  template <bool kSigned, int kSum>
  static __attribute__((always_inline)) void product() {
    if constexpr (kSigned) {
      if constexpr (kSum == 0) _tile_dpbssd(0, 4, 6);
      if constexpr (kSum == 1) _tile_dpbssd(1, 4, 7);
      if constexpr (kSum == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (kSum == 3) _tile_dpbssd(3, 5, 7);
    } else {
      if constexpr (kSum == 0) _tile_dpbsud(0, 4, 6);
      if constexpr (kSum == 1) _tile_dpbsud(1, 4, 7);
      if constexpr (kSum == 2) _tile_dpbsud(2, 5, 6);
      if constexpr (kSum == 3) _tile_dpbsud(3, 5, 7);
    }
  }

  // Adds the scaled sums of kSteps steps to the results.
  template <int kSteps, bool kSymmetric>
  void take_up(int half, int64_t t, int64_t first, const StepSums* sums) const {
    const TileOf& own = tiles_[t];
    const int64_t group_steps = weight_.steps / weight_.groups, rows = rows_in(half);
    Floats scale[kSteps], offset[kSteps];
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; ++i) {
      const int64_t group = group_steps == 1 ? first + i : (first + i) / group_steps;
      scale[i] = NumbersOf(own.weight->scales, own.tile, weight_.groups, group).part(0);
      if constexpr (!kSymmetric) {
        const NumbersOf minimums(own.weight->minimums, own.tile, weight_.groups, group);
        offset[i] = offset_at(own, group, 0, scale[i], minimums);
      }
    }
    const float* row_scales = scales_ + first * stride_ + half * kTileRows;
    const float* row_totals = totals_ + first * stride_ + half * kTileRows;
    float* out = out_ + (t * rows_ + half * kTileRows) * kTile;
    for (int64_t row = 0; row < rows; ++row, out += kTile) {
      Floats total = first ? load<Floats>(out) : Floats{};
#pragma GCC unroll 4
      for (int i = 0; i < kSteps; ++i) {
        total += to_floats(load<Ints>(sums[i][half][t] + row * kTile)) * (scale[i] * row_scales[i * stride_ + row]);
        if constexpr (!kSymmetric) total += offset[i] * row_totals[i * stride_ + row];
      }
      store(out, total, kLanes);
    }
  }

  const TileOf* tiles_;
  int64_t count_;
  const IntegerView& weight_;  // the first, for all that they have in common
  int64_t rows_, stride_, row_words_, chunk_;
  const uint32_t* x_;
  const float *scales_, *totals_;
  const uint32_t* codes_;  // expanded, or null
  float* out_;
  int64_t ahead_;  // tiles of a weight until the next one of this thread; 0 where they are expanded already
  alignas(64) uint32_t expanded_[2][2][kTileWords];
};

void begin_wide(const IntegerView& weight) {
  TileShapes shapes;
  for (int tile = 0; tile < 6; ++tile) shapes.set(tile, kTileRows, tile < 4 ? kTileBytes : chunk_of(weight));
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, chunk_of(weight) / 4, kTileBytes);
  shapes.use();
}

void end_wide() { _tile_release(); }

void wide_tiles(const TileOf* tiles, int64_t count, const uint32_t* codes, const Rounded& x, int64_t block,
                float* out) {
  WideProduct(tiles, count, codes, x, block, out).run();
}

constexpr WideKernels make_wide_kernels() { return {6, kTileRows, begin_wide, end_wide, expand_tiles, wide_tiles}; }

}  // namespace
}  // namespace llmopt
