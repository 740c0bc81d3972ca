#include "linear.h"

#include <algorithm>
#include <utility>

namespace llmopt {
namespace {

constexpr int64_t kItemsPerThread = 4;  // so that a thread that lost its core leaves little behind
constexpr int64_t kMostBlockRows = 16, kMostTiles = 2;
using TileResult = float[kMostTiles * kMostBlockRows * kTile];

// Calls body(item) for all items, runs of neighbours from one thread.
template <class Body>
void each(ThreadPool& pool, int64_t items, Body&& body) {
  const int64_t run = std::max<int64_t>(1, items / (pool.threads() * kItemsPerThread));
  pool.run((items + run - 1) / run, [&](int64_t number) {
    for (int64_t item = number * run; item < std::min(items, (number + 1) * run); ++item) body(item);
  });
}

const float* bias_of(const Part& part, int64_t tile) {
  const float* bias = part.integer ? part.integer->view().bias : part.dense->view().bias;
  return bias ? bias + tile * kTile : nullptr;
}

// Tiles first .. first + count - 1 of a part for all rows; `to.y` is the part's first column.
void run_tiles(const Kernels& kernels, const Part& part, const Activations& x, int64_t first, int64_t count,
               Destination to) {
  for (int64_t block = 0; block < x.blocks(); ++block) {
    alignas(64) TileResult result;
    x.multiply(kernels, part, first, count, block, result);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = (first + i) * kTile;
      kernels.integer.write(result + i * x.rows_in(block) * kTile, bias_of(part, first + i),
                            to.y + block * x.block_rows() * to.stride + column, to.stride, x.rows_in(block),
                            part.out() - column, to.add);
    }
  }
}

template <class Element>
Element* grown(Buffer<Element>& buffer, int64_t size) {
  if (buffer.size() < size) buffer = Buffer<Element>(size + size / 4);
  return buffer.data();
}

}  // namespace

DenseWeight::DenseWeight(const uint16_t* values, bool bfloat16, const float* bias, int64_t out, int64_t in)
    : values_((out + kTile - 1) / kTile * kTile * in) {
  const int64_t run = bfloat16 ? 2 : 1;  // inputs of one output that lie together
  for (int64_t output = 0; output < out; ++output) {
    uint16_t* to = values_.data() + output / kTile * kTile * in + output % kTile * run;
    for (int64_t i = 0; i < in; ++i) to[i / run * run * kTile + i % run] = values[output * in + i];
  }
  if (bias) {
    bias_ = Buffer<float>((out + kTile - 1) / kTile * kTile);
    std::copy(bias, bias + out, bias_.data());
  }
  view_ = {bfloat16 ? reinterpret_cast<const uint32_t*>(values_.data()) : nullptr, bfloat16 ? nullptr : values_.data(),
           bias_.data(), out, in};
}

bool Activations::same(const Part& a, const Part& b) {
  if (a.integer && b.integer) return RoundedRows::same(*a.integer, *b.integer);
  return a.dense && b.dense && !a.dense->view().pairs == !b.dense->view().pairs;
}

void Activations::fill(ThreadPool& pool, const Kernels& kernels, const Part& part, RoundingInput input, int64_t rows) {
  rows_ = rows;
  block_rows_ = rows_of_block(kernels.integer, rows);
  if (part.integer) return rounded_.fill(pool, kernels.integer, *part.integer, input, rows);
  const int64_t in = part.in(), held = blocks() * block_rows_;
  const bool pairs = part.dense->view().pairs != nullptr;
  dense_ = {pairs ? grown(pairs_, held * in / 2) : nullptr, pairs ? nullptr : grown(values_, held * in), rows, in,
            block_rows_};
  pool.run(blocks(), [&](int64_t block) {
    thread_local Buffer<float> scratch;
    kernels.dense.arrange_block(input, dense_, block, grown(scratch, in));
  });
}

void Activations::multiply(const Kernels& kernels, const Part& part, int64_t first, int64_t count, int64_t block,
                           float* out) const {
  if (part.integer) {
    const IntegerView* view = &part.integer->view();
    const TileOf tiles[kMostTiles] = {{view, first}, {view, first + 1}};
    return kernels.integer.tiles(tiles, count, rounded_.view(), block, out);
  }
  for (int64_t i = 0; i < count; ++i) {
    kernels.dense.tile(part.dense->view(), first + i, dense_, block, out + i * rows_in(block) * kTile);
  }
}

void Activations::multiply_two(const Kernels& kernels, const Part& one, const Part& other, int64_t tile, int64_t block,
                               float* out) const {
  if (one.integer) {
    const TileOf tiles[kMostTiles] = {{&one.integer->view(), tile}, {&other.integer->view(), tile}};
    return kernels.integer.tiles(tiles, 2, rounded_.view(), block, out);
  }
  multiply(kernels, one, tile, 1, block, out);
  multiply(kernels, other, tile, 1, block, out + rows_in(block) * kTile);
}

bool Activations::same_kind(const Part& a, const Part& b) {
  if (!a.integer || !b.integer) return !a.integer == !b.integer;
  const IntegerView &one = a.integer->view(), &other = b.integer->view();
  return one.bits == other.bits && one.groups == other.groups && !one.zeros == !other.zeros &&
         one.minimums.present() == other.minimums.present();
}

int64_t Activations::rows_in(int64_t block) const { return std::min(block_rows_, rows_ - block * block_rows_); }

Linear::Linear(std::vector<Part> parts) : parts_(std::move(parts)) {
  for (const Part& part : parts_) out_ += part.out();
}

void Linear::run(ThreadPool& pool, const Kernels& kernels, Activations& x, const RoundingInput& input, int64_t rows,
                 Destination to) const {
  const int64_t together = kernels.integer.tiles_together;
  for (size_t first = 0, last; first < parts_.size(); first = last) {
    int64_t items = 0;
    for (last = first; last < parts_.size() && Activations::same(parts_[first], parts_[last]); ++last) {
      items += (parts_[last].tiles() + together - 1) / together;
    }
    x.fill(pool, kernels, parts_[first], input, rows);
    each(pool, items, [&](int64_t item) {
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
  const Activations& x_up = shared ? x : other;
  each(pool, gate_.tiles(), [&](int64_t tile) {
    for (int64_t block = 0; block < x.blocks(); ++block) {
      alignas(64) TileResult results;
      const int64_t count = x.rows_in(block);
      float* up = results + count * kTile;
      if (alike) {
        x.multiply_two(kernels, gate_, up_, tile, block, results);
      } else {
        x.multiply(kernels, gate_, tile, 1, block, results);
        x_up.multiply(kernels, up_, tile, 1, block, up);
      }
      kernels.integer.write_silu(results, bias_of(gate_, tile), up, bias_of(up_, tile),
                                 to.y + block * x.block_rows() * to.stride + tile * kTile, to.stride, count,
                                 gate_.out() - tile * kTile);
    }
  });
}

}  // namespace llmopt
