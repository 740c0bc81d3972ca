// Products of bfloat16 weights by tile registers (amx.h). Every element is summed in an order that depends on nothing
// but the number of inputs, so that a row's result is the same to the bit in any block.

#include "amx.h"

namespace llmopt {
namespace {

constexpr int64_t kWidePairs = kTileBytes / 4;  // of inputs that one product takes

// The pairs of one product: as many as fit, and divide the row.
inline int64_t pair_chunk(int64_t pairs) {
  int64_t chunk = pairs < kWidePairs ? pairs : kWidePairs;
  while (pairs % chunk) --chunk;
  return chunk;
}

void begin_wide_pairs(const DenseView& weight) {
  const int64_t chunk = pair_chunk(weight.in / 2);
  TileShapes shapes;
  for (int tile = 0; tile < 4; ++tile) shapes.set(tile, kTileRows, tile < 2 ? kTileBytes : 4 * chunk);
  shapes.set(4, chunk, kTileBytes);
  shapes.use();
}

// Writes whole tiles of 16 rows, so that `out` must have room for them.
void dense_pairs(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, float* out) {
  const bool more = x.rows - block * x.block_rows > kTileRows;
  const int64_t pairs = weight.in / 2, chunk = pair_chunk(pairs);
  const uint32_t* from = weight.pairs + tile * pairs * kTile;
  const uint32_t* one = x.pairs + block * pairs * x.block_rows;
  const uint32_t* other = one + kTileRows * pairs;
  const long stride = 4 * pairs;
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t pair = 0; pair < pairs; pair += chunk, from += chunk * kTile) {
    for (int64_t i = 0; i < chunk; ++i) __builtin_prefetch(from + kAhead + i * kTile);
    _tile_loadd(4, from, kTileBytes);
    _tile_loadd(2, one + pair, stride);
    _tile_dpbf16ps(0, 2, 4);
    if (!more) continue;
    _tile_loadd(3, other + pair, stride);
    _tile_dpbf16ps(1, 3, 4);
  }
  _tile_stored(0, out, kTileBytes);
  if (more) _tile_stored(1, out + kTileRows * kTile, kTileBytes);
}

void end_wide_pairs() { _tile_release(); }

void dense_wide(const DenseView& weight, int64_t tile, const DenseRows& x, int64_t block, float* out) {
  weight.pairs ? dense_pairs(weight, tile, x, block, out) : dense_any(weight, tile, x, block, out);
}

constexpr DenseKernels make_dense_kernels() {
  return {kNativeBfloat16, begin_wide_pairs, end_wide_pairs, widen, arrange_block, expand_fp8_tile, dense_wide};
}

}  // namespace
}  // namespace llmopt
