// Attention's two products over bfloat16 by tile registers (amx.h), 16 rows at a time. A row's sums follow the order of
// channels, or of tokens, and depend on nothing beside it.

#include "amx.h"

namespace llmopt {
namespace {

constexpr int kSumTiles = 4;
constexpr int64_t kGroupPairs = kGroup / 2;

// Pairs of channels that one product of queries and keys takes.
inline int64_t channel_chunk(int64_t pairs) { return pairs % (kTileBytes / 4) ? kGroupPairs : kTileBytes / 4; }

// The registers of a thread for as long as it attends: 0 to 3 hold sums, 4 queries and 5 keys, 6 weights and 7 values.
class AttentionTiles {
 public:
  explicit AttentionTiles(const AttentionShape& shape) {
    const int64_t chunk = channel_chunk(shape.head_dim / 2);
    TileShapes shapes;
    for (int tile = 0; tile < kSumTiles; ++tile) shapes.set(tile, kTileRows, kTileBytes);
    shapes.set(4, kTileRows, 4 * chunk);
    shapes.set(5, chunk, kTileBytes);
    shapes.set(6, kTileRows, 4 * kGroupPairs);
    shapes.set(7, kGroupPairs, kTileBytes);
    shapes.use();
  }
  ~AttentionTiles() { _tile_release(); }
  AttentionTiles(const AttentionTiles&) = delete;
  AttentionTiles& operator=(const AttentionTiles&) = delete;

  // scores [16][kSpan] of 16 queries [16][pairs] and the keys of these groups.
  static void score(const uint32_t* queries, int64_t pairs, const Groups& keys, Range groups, float* scores) {
    const int64_t chunk = channel_chunk(pairs);
    for (int64_t group = groups.first; group < groups.last; group += kSumTiles) {
      const int64_t count = groups.last - group;
      clear(count);
      for (int64_t pair = 0; pair < pairs; pair += chunk) {
        _tile_loadd(4, queries + pair, 4 * pairs);
        const auto load_keys = [&](int64_t i) {
          _tile_loadd(5, keys.at[group + i] + pair * keys.stride, keys.stride);
        };
        load_keys(0);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
          load_keys(1);
          _tile_dpbf16ps(1, 4, 5);
        }
        if (count > 2) {
          load_keys(2);
          _tile_dpbf16ps(2, 4, 5);
        }
        if (count > 3) {
          load_keys(3);
          _tile_dpbf16ps(3, 4, 5);
        }
      }
      store_sums(count, scores + group * kGroup, kSpan);
    }
  }

  // sums [16][stride] of the values of these groups, in their first head_dim floats, weighted by 16 rows of pairs, kSpan
  // words apart.
  static void sum(const float* weights, const Groups& values, Range groups, int64_t head_dim, float* sums,
                  int64_t stride) {
    for (int64_t channel = 0; channel < head_dim; channel += kSumTiles * kTile) {
      const int64_t count = (head_dim - channel) / kTile;
      clear(count);
      for (int64_t group = groups.first; group < groups.last; ++group) {
        _tile_loadd(6, weights + group * kGroupPairs, 4 * kSpan);
        const auto load_values = [&](int64_t i) {
          _tile_loadd(7, values.at[group] + 4 * (channel + i * kTile), values.stride);
        };
        load_values(0);
        _tile_dpbf16ps(0, 6, 7);
        if (count > 1) {
          load_values(1);
          _tile_dpbf16ps(1, 6, 7);
        }
        if (count > 2) {
          load_values(2);
          _tile_dpbf16ps(2, 6, 7);
        }
        if (count > 3) {
          load_values(3);
          _tile_dpbf16ps(3, 6, 7);
        }
      }
      store_sums(count, sums + channel, stride);
    }
  }

 private:
  static void clear(int64_t count) {
    _tile_zero(0);
    if (count > 1) _tile_zero(1);
    if (count > 2) _tile_zero(2);
    if (count > 3) _tile_zero(3);
  }

  // Side by side, 16 floats each; rows are `stride` floats apart.
  static void store_sums(int64_t count, float* to, int64_t stride) {
    _tile_stored(0, to, 4 * stride);
    if (count > 1) _tile_stored(1, to + kTile, 4 * stride);
    if (count > 2) _tile_stored(2, to + 2 * kTile, 4 * stride);
    if (count > 3) _tile_stored(3, to + 3 * kTile, 4 * stride);
  }
};

}  // namespace
}  // namespace llmopt
