// Attention over a paged cache, written once in the compiler's vector types; included as kernels_impl.h is. Each
// instruction set's file defines, besides what is named there:
//
//   kAttentionRows, kAttentionColumns   rows, and vectors of keys or channels, whose sums stay in registers
//   dot_bfloat16(sum, a, b)             sum + the products of both bfloat16 of a and b, lane by lane
//   dot_int16(sum, a, b)                the same of signed integers
//   store_bfloat16(to, floats)          rounds and stores one vector
//   widen_int8(from), widen_uint8       consecutive 8-bit numbers as 16-bit ones, two in a word
//   look_up(table, indices)             entries of a table of eight 16-bit numbers
//
// A row's result never depends on the rows beside it: spans of keys begin at absolute positions, a span's sums are
// taken by themselves in the order of its keys, and spans are merged in order (the online softmax of Dao et al. 2022,
// arXiv:2205.14135; softmax_impl.h). What a row does not see has the weight 0 and adds nothing.

namespace llmopt {
namespace {

constexpr int64_t kSpanGroups = kSpan / kGroup;
constexpr int64_t kGroupVectors = kGroup / kLanes;
constexpr float kLog2E = 1.44269504F;

// Keys or values of a span in pairs, by groups of 16 tokens.
struct Groups {
  const char* at[kSpanGroups];
  int64_t stride;  // bytes from one pair to the next, of channels (keys) or of tokens (values)
};

// Tokens, groups or vectors, counted from the beginning of a span.
struct Range {
  int64_t first, last;
};

}  // namespace
}  // namespace llmopt

#if defined(__AMX_BF16__)
#include "attention_tiles_impl.h"
#endif

namespace llmopt {
namespace {

inline int64_t clamped(int64_t token) { return token < 0 ? 0 : token < kSpan ? token : kSpan; }

// `value` in these lanes, `otherwise` in the others.
inline Floats within(Range lanes, Floats value, float otherwise) {
  if (lanes.first <= 0 && lanes.last >= kLanes) return value;
  const Ints lane = lane_numbers();
  const Ints inside = (lane >= static_cast<int>(lanes.first)) & (lane < static_cast<int>(lanes.last));
  return inside ? value : broadcast(otherwise);
}

// One key head's rows of a tile over one span.
class SpanWork {
 public:
  SpanWork(const AttentionShape& shape, const LayerCache& cache, const QueryTile& tile, const AttentionScratch& scratch,
           int64_t head, int64_t span)
      : shape_(shape),
        cache_(cache),
        tile_(tile),
        scratch_(scratch),
        shared_(shape.heads / shape.kv_heads),
        rows_(tile.count * shared_),
        pairs_(shape.head_dim / 2),
        head_(head),
        start_(span * kSpan),
        integers_(shape.kind == CacheKind::kInt8),
        groups_(groups_of(0, rows_ - 1)) {}

  // Begin to bring the span's keys or values into the cache of the core: the processor itself foresees only what lies
  // in one run, and blocks do not.
  __attribute__((always_inline)) void fetch_keys() const { fetch(cache_.keys, cache_.key_scales); }
  __attribute__((always_inline)) void fetch_values() const { fetch(cache_.values, cache_.value_scales); }

  // Sets the rows' weights of the span's keys, and all of their states but the values.
  void weigh_keys() const {
    const Groups keys = find_keys();
    if (integers_) gather_scales();
    integers_ ? row_blocks<kAttentionRows>(ScoreBlocks<Int8Pairs>{*this, keys}) : score_bfloat16(keys);
    for (int64_t row = 0; row < rows_; ++row) weigh(row);
  }

  // Adds up the weighted values; scratch.partial then holds the rows' states over this span alone.
  void sum_values() const {
    const Groups values = find_values();
    integers_ ? row_blocks<kAttentionRows>(ValueBlocks<Int8Pairs>{*this, values}) : sum_bfloat16(values);
  }

 private:
  // Always inlined, as fetch_place is.
  __attribute__((always_inline)) void fetch(const void* numbers, const float* scales) const {
    const int64_t bytes = kGroup * pairs_ * pair_bytes();
    for (int64_t group = groups_.first; group < groups_.last; ++group) {
      const int64_t token = token_at(group);
      const char* from = static_cast<const char*>(numbers) + token * pairs_ * pair_bytes();
      for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i, 0, 2);
      if (integers_) __builtin_prefetch(scales + token, 0, 2);
    }
  }

  int64_t pair_bytes() const { return shape_.kind == CacheKind::kBFloat16 ? 4 : 2; }

  // The tokens that a row sees.
  Range visible(int64_t row) const {
    const int64_t end = tile_.position + row / shared_ + 1 - start_;
    return {shape_.window > 0 ? clamped(end - shape_.window) : 0, clamped(end)};
  }

  // The groups that rows first .. last see between them; both edges move with the row.
  Range groups_of(int64_t first, int64_t last) const {
    return {visible(first).first / kGroup, (visible(last).last + kGroup - 1) / kGroup};
  }

  // Where a group begins in its block, and in the cache, counted over [blocks][kv_heads][block_size].
  int64_t offset_of(int64_t group) const { return (start_ + group * kGroup) % shape_.block_size; }
  int64_t token_at(int64_t group) const {
    const int64_t block = tile_.table[(start_ + group * kGroup) / shape_.block_size];
    return (block * shape_.kv_heads + head_) * shape_.block_size + offset_of(group);
  }

  // Where the keys are, or where they are expanded to.
  Groups find_keys() const {
    const bool expands = shape_.kind == CacheKind::kFp8;
    const int64_t row = shape_.block_size * pair_bytes(), expanded_row = kGroup * Bfloat16Pairs::kBytes;
    Groups keys{{}, expands ? expanded_row : row};
    for (int64_t group = groups_.first; group < groups_.last; ++group) {
      const int64_t offset = offset_of(group), pair = (token_at(group) - offset) * pairs_ + offset;
      const char* from = static_cast<const char*>(cache_.keys) + pair * pair_bytes();
      char* to = scratch_.expanded + group * pairs_ * expanded_row;
      keys.at[group] = expands ? to : from;
      for (int64_t i = 0; expands && i < pairs_; ++i) expand_fp8(from + i * row, kGroup, to + i * expanded_row);
    }
    return keys;
  }

  // The same of values. What the cache holds beyond the sequence may be no number, and 0 times that is none either: a
  // copy has zeros there.
  Groups find_values() const {
    const bool expands = shape_.kind == CacheKind::kFp8;
    const int64_t pairs = kGroup * pairs_, bytes = pairs * Bfloat16Pairs::kBytes;
    Groups values{{}, shape_.head_dim * (expands ? Bfloat16Pairs::kBytes : pair_bytes())};
    for (int64_t group = groups_.first; group < groups_.last; ++group) {
      const char* from = static_cast<const char*>(cache_.values) + token_at(group) * pairs_ * pair_bytes();
      const int64_t held = tile_.context - start_ - group * kGroup;  // tokens of the group that the sequence has
      const bool copies = expands || (held < kGroup && !integers_);
      char* to = scratch_.expanded + group * bytes;
      values.at[group] = copies ? to : from;
      if (expands) expand_fp8(from, pairs, to);
      if (copies && !expands) std::memcpy(to, from, static_cast<size_t>(bytes));
      if (copies && held < kGroup) clear_after(held, to);
    }
    return values;
  }

  // Clears bfloat16 values [kGroup / 2][head_dim][2] from token `held` on.
  void clear_after(int64_t held, char* values) const {
    const int64_t row = shape_.head_dim * Bfloat16Pairs::kBytes, begun = (held + 1) / 2;
    std::memset(values + begun * row, 0, static_cast<size_t>((kGroup / 2 - begun) * row));
    for (int64_t i = 0; held % 2 && i < shape_.head_dim; ++i) {  // the second tokens of the last pair
      std::memset(values + held / 2 * row + i * Bfloat16Pairs::kBytes + 2, 0, 2);
    }
  }

  void gather_scales() const {
    for (int64_t group = groups_.first; group < groups_.last; ++group) {
      const int64_t from = token_at(group), to = group * kGroup;
      std::memcpy(scratch_.key_scales + to, cache_.key_scales + from, kGroup * sizeof(float));
      std::memcpy(scratch_.value_scales + to, cache_.value_scales + from, kGroup * sizeof(float));
    }
  }

#if defined(__AMX_BF16__)
  // Rows up to a multiple of 16 are computed; scratch has room for them.
  void score_bfloat16(const Groups& keys) const {
    for (int64_t row = 0; row < rows_; row += kTileRows) {
      AttentionTiles::score(scratch_.queries + row * pairs_, pairs_, keys, groups_of(row, last_of_tile(row)),
                            scratch_.scores + row * kSpan);
    }
  }
  void sum_bfloat16(const Groups& values) const {
    const int64_t length = state_floats(shape_.head_dim);
    for (int64_t row = 0; row < rows_; row += kTileRows) {
      AttentionTiles::sum(scratch_.scores + row * kSpan, values, groups_of(row, last_of_tile(row)), shape_.head_dim,
                          scratch_.partial + row * length, length);
    }
  }
  int64_t last_of_tile(int64_t row) const { return row + kTileRows < rows_ ? row + kTileRows - 1 : rows_ - 1; }
#else
  void score_bfloat16(const Groups& keys) const {
    row_blocks<kAttentionRows>(ScoreBlocks<Bfloat16Pairs>{*this, keys});
  }
  void sum_bfloat16(const Groups& values) const {
    row_blocks<kAttentionRows>(ValueBlocks<Bfloat16Pairs>{*this, values});
  }
#endif

  // Calls block.run<rows>(first row) for all rows, in blocks that fit the registers, spread evenly. The last block may
  // repeat some rows.
  template <int kRows, class Block>
  void row_blocks(const Block& block) const {
    const int64_t count = (rows_ + kRows - 1) / kRows;
    if constexpr (kRows > 1) {
      if ((rows_ + count - 1) / count < kRows) return row_blocks<kRows - 1>(block);
    }
    for (int64_t row = 0; row < rows_; row += kRows) {
      block.template run<kRows>(row + kRows <= rows_ ? row : rows_ - kRows);
    }
  }

  template <class Pairs>
  struct ScoreBlocks {
    const SpanWork& work;
    const Groups& keys;
    template <int kRows>
    void run(int64_t row) const {
      const Range groups = work.groups_of(row, row + kRows - 1);
      work.score<Pairs, kRows, kAttentionColumns>(keys, row,
                                                  {groups.first * kGroupVectors, groups.last * kGroupVectors});
    }
  };

  template <class Pairs>
  struct ValueBlocks {
    const SpanWork& work;
    const Groups& values;
    template <int kRows>
    void run(int64_t row) const {
      const Range groups = work.groups_of(row, row + kRows - 1);
      work.sum<Pairs, kRows, kAttentionColumns>(values, groups, row, {0, work.shape_.head_dim / kLanes});
    }
  };

  // Products of kRows queries and these vectors of keys.
  template <class Pairs, int kRows, int kColumns>
  void score(const Groups& keys, int64_t row, Range vectors) const {
    const uint32_t* queries = scratch_.queries + row * pairs_;
    for (; vectors.first + kColumns <= vectors.last; vectors.first += kColumns) {
      const char* from[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        const int64_t vector = vectors.first + c;
        from[c] = keys.at[vector / kGroupVectors] + vector % kGroupVectors * kLanes * Pairs::kBytes;
      }
      typename Pairs::Sum sum[kRows][kColumns] = {};
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        Words key[kColumns];
        for (int c = 0; c < kColumns; ++c) key[c] = Pairs::read(from[c] + pair * keys.stride);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Words query = Words{} + queries[r * pairs_ + pair];
          for (int c = 0; c < kColumns; ++c) sum[r][c] = Pairs::dot(sum[r][c], query, key[c]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        float* to = scratch_.scores + (row + r) * kSpan + vectors.first * kLanes;
        for (int c = 0; c < kColumns; ++c) store(to + c * kLanes, Pairs::floats(sum[r][c]), kLanes);
      }
    }
    if constexpr (kColumns > 1) {
      if (vectors.first < vectors.last) score<Pairs, kRows, kColumns / 2>(keys, row, vectors);
    }
  }

  // Turns a row's products into weights 2^(score - largest score), 0 for what it does not see, and sets the sums of
  // weights and the largest score of its state.
  void weigh(int64_t row) const {
    const Range seen = visible(row), groups = groups_of(row, row);
    float* scores = scratch_.scores + row * kSpan;
    auto* codes = reinterpret_cast<uint16_t*>(scores);  // of the weights: never ahead of the scores still to be read
    float* state = scratch_.partial + row * state_floats(shape_.head_dim) + shape_.head_dim;
    const float largest = scale_scores(row, seen, groups);
    const auto clear = [&](int64_t from, int64_t end) {
      std::memset(codes + from * kGroup, 0, static_cast<size_t>((end - from) * kGroup) * sizeof *codes);
    };
    clear(groups_.first, groups.first);
    Floats sums[kGroupVectors] = {};
    for (int64_t group = groups.first; group < groups.last; ++group) {
      for (int64_t part = 0; part < kGroupVectors; ++part) {
        const int64_t at = group * kGroup + part * kLanes;
        const Floats weight = power_of_two(load<Floats>(scores + at) - largest);
        sums[part] += weight;
        if (integers_) {
          const Floats scaled = weight * load<Floats>(scratch_.value_scales + at);
          store(scores + at, within({seen.first - at, seen.last - at}, scaled, 0), kLanes);
        } else {
          store_bfloat16(codes + at, weight);
        }
      }
    }
    const int64_t first = groups.first * kGroup, count = groups.last * kGroup - first;
    scratch_.weight_scales[row] = integers_ ? encode_int16(scores + first, count, codes + first) : 1.0F;
    clear(groups.last, groups_.last);
    for (int64_t part = 0; part < kGroupVectors; ++part) store(state + part * kLanes, sums[part], kLanes);
    state[kGroup] = largest;
  }

  // Scales products to powers of two, minus infinity for what is not seen, and returns the largest.
  float scale_scores(int64_t row, Range seen, Range groups) const {
    float* scores = scratch_.scores + row * kSpan;
    const Floats factor = broadcast(shape_.scale * kLog2E * scratch_.query_scales[row]);
    Floats largest = broadcast(kLowest);
    for (int64_t at = groups.first * kGroup; at < groups.last * kGroup; at += kLanes) {
      Floats score = load<Floats>(scores + at) * factor;
      if (integers_) score *= load<Floats>(scratch_.key_scales + at);
      score = within({seen.first - at, seen.last - at}, score, -__builtin_inff());
      store(scores + at, score, kLanes);
      largest = larger(score, largest);
    }
    return largest_of<float, kLanes>(largest);
  }

  // Sums of kRows rows' weighted values, of these vectors of channels, to the rows' states.
  template <class Pairs, int kRows, int kColumns>
  void sum(const Groups& values, Range groups, int64_t row, Range vectors) const {
    const int64_t length = state_floats(shape_.head_dim);
    for (; vectors.first + kColumns <= vectors.last; vectors.first += kColumns) {
      typename Pairs::Sum total[kRows][kColumns] = {};
      for (int64_t group = groups.first; group < groups.last; ++group) {
        const char* from = values.at[group] + vectors.first * kLanes * Pairs::kBytes;
        const float* weights = scratch_.scores + row * kSpan + group * (kGroup / 2);
        for (int64_t pair = 0; pair < kGroup / 2; ++pair) {
          Words value[kColumns];
          for (int c = 0; c < kColumns; ++c) {
            value[c] = Pairs::read(from + pair * values.stride + c * kLanes * Pairs::kBytes);
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Words weight = Words{} + load<uint32_t>(weights + r * kSpan + pair);
            for (int c = 0; c < kColumns; ++c) total[r][c] = Pairs::dot(total[r][c], weight, value[c]);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        float* to = scratch_.partial + (row + r) * length + vectors.first * kLanes;
        const float scale = scratch_.weight_scales[row + r];
        for (int c = 0; c < kColumns; ++c) store(to + c * kLanes, Pairs::floats(total[r][c]) * scale, kLanes);
      }
    }
    if constexpr (kColumns > 1) {
      if (vectors.first < vectors.last) sum<Pairs, kRows, kColumns / 2>(values, groups, row, vectors);
    }
  }

  const AttentionShape& shape_;
  const LayerCache& cache_;
  const QueryTile& tile_;
  const AttentionScratch& scratch_;
  int64_t shared_, rows_, pairs_, head_, start_;
  bool integers_;
  Range groups_;  // what any row sees
};

// Rounds the queries of a key head's rows to 16 bits, and lets the rows have seen nothing.
inline void begin_rows(const AttentionShape& shape, const QueryTile& tile, int64_t head, float* states,
                       const AttentionScratch& scratch) {
  const int64_t shared = shape.heads / shape.kv_heads, dim = shape.head_dim;
  for (int64_t row = 0; row < tile.count * shared; ++row) {
    const float* query = tile.queries + row / shared * tile.query_stride + (head * shared + row % shared) * dim;
    uint32_t* pairs = scratch.queries + row * (dim / 2);
    scratch.query_scales[row] = 1.0F;
    if (shape.kind == CacheKind::kInt8) {
      scratch.query_scales[row] = encode_int16(query, dim, pairs);
    } else {
      encode_bfloat16(query, dim, pairs);
    }
    clear_state(states + row * state_floats(dim), dim);
  }
}

void attend_spans(const AttentionShape& shape, const LayerCache& cache, const QueryTile& tile, Heads heads,
                  Spans spans, float* states, const AttentionScratch& scratch) {
  const int64_t rows = tile.count * (shape.heads / shape.kv_heads);
#if defined(__AMX_BF16__)
  const AttentionTiles tiles(shape);
#endif
  for (int64_t head = heads.first; head < heads.last; ++head, states += rows * state_floats(shape.head_dim)) {
    begin_rows(shape, tile, head, states, scratch);
    for (int64_t span = spans.first; span < spans.last; ++span) {
      const SpanWork work(shape, cache, tile, scratch, head, span);
      if (head == heads.first && span == spans.first) work.fetch_keys();
      work.fetch_values();
      work.weigh_keys();
      const bool more = span + 1 < spans.last;
      if (more) SpanWork(shape, cache, tile, scratch, head, span + 1).fetch_keys();
      if (!more && head + 1 < heads.last) SpanWork(shape, cache, tile, scratch, head + 1, spans.first).fetch_keys();
      work.sum_values();
      merge_states(states, scratch.partial, rows, shape.head_dim);
    }
  }
}

}  // namespace
}  // namespace llmopt
