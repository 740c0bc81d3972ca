#include "linear.h"

#include <algorithm>
#include <utility>

namespace llmopt {
namespace {

constexpr int64_t kItemsPerThread = 4;  // so that a thread that lost its core leaves little behind
constexpr int64_t kMostBlockRows = 32, kMostTiles = 2;
using TileResult = float[kMostTiles * kMostBlockRows * kTile];

template <class Element>
Element* grown(Buffer<Element>& buffer, int64_t size) {
  if (buffer.size() < size) buffer = Buffer<Element>(size + size / 4);
  return buffer.data();
}

// Calls body(item) for all items, runs of neighbours from one thread, which is ready for `part` meanwhile.
template <class Body>
void each(ThreadPool& pool, const Kernels& kernels, const Activations& x, const Part& part, int64_t items,
          Body&& body) {
  const int64_t run = std::max<int64_t>(1, items / (pool.threads() * kItemsPerThread));
  pool.run((items + run - 1) / run, [&](int64_t number) {
    const Activations::Ready ready(x, kernels, part);
    for (int64_t item = number * run; item < std::min(items, (number + 1) * run); ++item) body(item);
  });
}

TileOf tile_of(const PartTile& own) { return {&own.part->integer->view(), own.tile}; }

const float* bias_of(const Part& part, int64_t tile) {
  const float* bias = part.integer ? part.integer->view().bias : part.dense->view().bias;
  return bias ? bias + tile * kTile : nullptr;
}

}  // namespace

bool Activations::same(const Part& a, const Part& b) {
  if (a.integer && b.integer) return RoundedRows::same(*a.integer, *b.integer);
  if (!a.dense || !b.dense) return false;
  const DenseView &one = a.dense->view(), &other = b.dense->view();
  return one.takes_pairs() == other.takes_pairs() && one.rows_in_fp8 == other.rows_in_fp8;
}

void Activations::fill(ThreadPool& pool, const Kernels& kernels, const Part& part, RoundingInput input, int64_t rows) {
  rows_ = rows;
  if (part.integer) {
    rounded_.fill(pool, kernels.integer, *part.integer, input, rows);
    block_rows_ = rounded_.view().block_rows;
    return;
  }
  const DenseView& weight = part.dense->view();
  const bool bfloat16 = weight.takes_pairs(), pairs = bfloat16 && kernels.dense.native_bfloat16;
  const bool wide = pairs && kernels.dense.begin_wide;
  block_rows_ = rows_of_block(kernels.integer, rows, wide);
  const int64_t in = part.in(), held = blocks() * block_rows_;
  dense_ = {pairs ? grown(pairs_, held * in / 2) : nullptr, pairs ? nullptr : grown(values_, held * in),
            weight.rows_in_fp8 ? grown(scales_, rows) : nullptr, rows, in, block_rows_, wide, bfloat16};
  pool.run(blocks(), [&](int64_t block) {
    thread_local Buffer<float> scratch;
    kernels.dense.arrange_block(input, dense_, block, grown(scratch, in));
  });
}

Activations::Ready::Ready(const Activations& x, const Kernels& kernels, const Part& part) {
  if (part.integer && x.rounded_.view().wide) {
    kernels.integer.wide.begin(part.integer->view());
    end_ = kernels.integer.wide.end;
  } else if (part.dense && x.dense_.wide) {
    kernels.dense.begin_wide(part.dense->view());
    end_ = kernels.dense.end_wide;
  }
}

Activations::Ready::~Ready() {
  if (end_) end_();
}

template <class Write>
void Activations::multiply(const Kernels& kernels, const PartTile* tiles, int64_t count, Write&& write) const {
  const uint32_t* expanded = expand(kernels, tiles, count);
  for (int64_t block = 0; block < blocks(); ++block) {
    alignas(64) TileResult result;
    multiply_block(kernels, tiles, count, expanded, block, result);
    write(block, result);
  }
}

const uint32_t* Activations::expand(const Kernels& kernels, const PartTile* tiles, int64_t count) const {
  const bool several = blocks() > 1;
  if (tiles->part->integer ? !(rounded_.view().wide && several) : !(dense_.wide || several)) return nullptr;
  thread_local Buffer<uint32_t> memory;
  if (tiles->part->integer) {
    const TileOf some[kMostTiles] = {tile_of(tiles[0]), tile_of(tiles[count - 1])};
    kernels.integer.wide.expand(some, count, grown(memory, count * tiles->part->integer->view().in / 4 * kTile));
    return memory.data();
  }
  const int64_t size = dense_.in / 2 * kTile;
  for (int64_t i = 0; i < count; ++i) {
    const DenseView& weight = tiles[i].part->dense->view();
    if (weight.fp8_pairs) kernels.dense.expand(weight, tiles[i].tile, grown(memory, count * size) + i * size);
  }
  return memory.data();
}

void Activations::multiply_block(const Kernels& kernels, const PartTile* tiles, int64_t count, const uint32_t* expanded,
                                 int64_t block, float* out) const {
  if (tiles->part->integer) {
    const TileOf some[kMostTiles] = {tile_of(tiles[0]), tile_of(tiles[count - 1])};
    const Rounded& x = rounded_.view();
    return x.wide ? kernels.integer.wide.tiles(some, count, expanded, x, block, out)
                  : kernels.integer.tiles(some, count, x, block, out);
  }
  for (int64_t i = 0; i < count; ++i) {
    multiply_dense(kernels, tiles[i], expanded ? expanded + i * (dense_.in / 2) * kTile : nullptr, block,
                   out + i * rows_in(block) * kTile);
  }
}

void Activations::multiply_dense(const Kernels& kernels, const PartTile& own, const uint32_t* expanded, int64_t block,
                                 float* out) const {
  const DenseView& weight = own.part->dense->view();
  if (!weight.fp8_pairs) return kernels.dense.tile(weight, own.tile, dense_, block, out);
  DenseView tile = weight;
  if (expanded) tile.pairs = expanded;
  kernels.dense.tile(tile, expanded ? 0 : own.tile, dense_, block, out);
  const float* scales = weight.scales + own.tile * kTile;
  for (int64_t row = 0; row < rows_in(block); ++row) {
    const float scale = dense_.scales ? dense_.scales[block * block_rows_ + row] : 1.0F;
    for (int64_t i = 0; i < kTile; ++i) out[row * kTile + i] *= scale * scales[i];
  }
}

bool Activations::same_kind(const Part& a, const Part& b) {
  if (!a.integer || !b.integer) return !a.integer == !b.integer;
  const IntegerView &one = a.integer->view(), &other = b.integer->view();
  return one.stored == other.stored && one.groups == other.groups && !one.zeros == !other.zeros &&
         one.minimums.present() == other.minimums.present();
}

int64_t Activations::rows_in(int64_t block) const { return std::min(block_rows_, rows_ - block * block_rows_); }

namespace {

// Tiles first .. first + count - 1 of a part for all rows; `to.y` is the part's first column.
void run_tiles(const Kernels& kernels, const Part& part, const Activations& x, int64_t first, int64_t count,
               Destination to) {
  const PartTile tiles[kMostTiles] = {{&part, first}, {&part, first + 1}};
  x.multiply(kernels, tiles, count, [&](int64_t block, const float* result) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = (first + i) * kTile;
      kernels.integer.write(result + i * x.rows_in(block) * kTile, bias_of(part, first + i),
                            to.y + block * x.block_rows() * to.stride + column, to.stride, x.rows_in(block),
                            part.out() - column, to.add);
    }
  });
}

}  // namespace

Linear::Linear(std::vector<Part> parts) : parts_(std::move(parts)) {
  for (const Part& part : parts_) out_ += part.out();
}

void Linear::run(ThreadPool& pool, const Kernels& kernels, Activations& x, const RoundingInput& input, int64_t rows,
                 Destination to) const {
  if (rows == 0) return;  // as the head has in a step that ends no prompt
  const int64_t together = kernels.integer.tiles_together;
  for (size_t first = 0, last; first < parts_.size(); first = last) {
    int64_t items = 0;
    for (last = first; last < parts_.size() && Activations::same(parts_[first], parts_[last]); ++last) {
      items += (parts_[last].tiles() + together - 1) / together;
    }
    x.fill(pool, kernels, parts_[first], input, rows);
    each(pool, kernels, x, parts_[first], items, [&](int64_t item) {
      const Part* part = &parts_[first];
      float* y = to.y;
      for (int64_t own; item >= (own = (part->tiles() + together - 1) / together); ++part) {
        item -= own;
        y += part->out();
      }
      const int64_t tile = item * together;
      run_tiles(kernels, *part, x, tile, std::min(together, part->tiles() - tile), {y, to.stride, to.add});
    });
    for (; first < last; ++first) to.y += parts_[first].out();
  }
}

void GatedLinear::run(ThreadPool& pool, const Kernels& kernels, Activations& x, Activations& other,
                      const RoundingInput& input, int64_t rows, Destination to) const {
  x.fill(pool, kernels, gate_, input, rows);
  const bool shared = Activations::same(gate_, up_), alike = shared && Activations::same_kind(gate_, up_);
  if (!shared) other.fill(pool, kernels, up_, input, rows);
  each(pool, kernels, x, gate_, gate_.tiles(), [&](int64_t tile) {
    const auto write = [&](const Activations& own, int64_t block, const float* gate, const float* up) {
      kernels.integer.write_silu(gate, bias_of(gate_, tile), up, bias_of(up_, tile),
                                 to.y + block * own.block_rows() * to.stride + tile * kTile, to.stride,
                                 own.rows_in(block), gate_.out() - tile * kTile);
    };
    const PartTile tiles[kMostTiles] = {{&gate_, tile}, {&up_, tile}};
    if (alike) {
      return x.multiply(kernels, tiles, 2, [&](int64_t block, const float* both) {
        write(x, block, both, both + x.rows_in(block) * kTile);
      });
    }
    thread_local Buffer<float> gates;  // [rows][16]
    float* gate = grown(gates, rows * kTile);
    const Activations::Ready for_gate(x, kernels, gate_);
    x.multiply(kernels, tiles, 1, [&](int64_t block, const float* result) {
      std::copy(result, result + x.rows_in(block) * kTile, gate + block * x.block_rows() * kTile);
    });
    const Activations& x_up = shared ? x : other;
    const Activations::Ready for_up(x_up, kernels, up_);
    x_up.multiply(kernels, tiles + 1, 1, [&](int64_t block, const float* up) {
      write(x_up, block, gate + block * x_up.block_rows() * kTile, up);
    });
  });
}

}  // namespace llmopt
