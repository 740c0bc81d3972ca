#include "multiply.h"

#include <algorithm>

namespace llmopt {
namespace {

constexpr int64_t kRowsPerItem = 8;     // of work on x itself
constexpr int64_t kItemsPerThread = 8;  // so that a thread that lost its core leaves little behind

// Calls body(row) for every row, several rows an item.
template <class Body>
void each_row(ThreadPool& pool, int64_t rows, Body&& body) {
  pool.run((rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
    const int64_t last = std::min(rows, (item + 1) * kRowsPerItem);
    for (int64_t row = item * kRowsPerItem; row < last; ++row) body(row);
  });
}

// Calls body(tiles) over all tiles, in runs of a multiple of `step` that give every thread several.
template <class Body>
void each_tiles(ThreadPool& pool, int64_t tiles, int64_t step, Body&& body) {
  const int64_t wanted = tiles / (pool.threads() * kItemsPerThread);
  const int64_t run = std::max<int64_t>(1, wanted / step) * step;
  pool.run((tiles + run - 1) / run, [&](int64_t item) {
    body(Tiles{item * run, std::min(tiles, (item + 1) * run)});
  });
}

// x with its columns in the packed order, zeros where the order has none.
Buffer<float> reorder(ThreadPool& pool, const std::vector<int32_t>& order, const Rows& rows) {
  const auto width = static_cast<int64_t>(order.size());
  Buffer<float> gathered(rows.count * width);
  each_row(pool, rows.count, [&](int64_t row) {
    const float* from = rows.x + row * rows.x_stride;
    float* to = gathered.data() + row * width;
    for (int64_t i = 0; i < width; ++i) {
      const int32_t source = order[static_cast<size_t>(i)];
      to[i] = source < 0 ? 0.0F : from[source];
    }
  });
  return gathered;
}

void multiply_integers(ThreadPool& pool, const Kernels& kernels, const PackedWeight& packed, const Rows& rows) {
  const WeightView weight = packed.view();
  Buffer<uint8_t> codes(rows.count * weight.in);
  Buffer<float> scales(rows.count);
  each_row(pool, rows.count, [&](int64_t row) {
    scales[row] = kernels.round_row(rows.x + row * rows.x_stride, weight.in, codes.data() + row * weight.in);
  });
  each_tiles(pool, packed.tiles(), kernels.panel_tiles, [&](Tiles tiles) {
    kernels.integers(weight, tiles, rows, codes.data(), scales.data());
  });
}

}  // namespace

void multiply(ThreadPool& pool, const Kernels& kernels, const PackedWeight& packed, Rows rows) {
  const WeightView weight = packed.view();
  Buffer<float> gathered;
  if (!packed.order().empty()) {
    gathered = reorder(pool, packed.order(), rows);
    rows.x = gathered.data();
    rows.x_stride = weight.in;
  }
  if (packed.integer_activations()) {
    multiply_integers(pool, kernels, packed, rows);
  } else if (rows.count <= kernels.fused_rows) {
    each_tiles(pool, packed.tiles(), 1, [&](Tiles tiles) { kernels.fused(weight, tiles, rows); });
  } else {
    each_tiles(pool, packed.tiles(), kernels.panel_tiles, [&](Tiles tiles) {
      thread_local Buffer<float> panel;  // kept from call to call: pages fresh from the system cost more than the work
      if (panel.size() < kernels.panel_tiles * weight.in * kTile) {
        panel = Buffer<float>(kernels.panel_tiles * weight.in * kTile);
      }
      kernels.panels(weight, tiles, rows, panel.data());
    });
  }
}

}  // namespace llmopt
