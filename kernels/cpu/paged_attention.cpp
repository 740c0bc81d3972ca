#include "paged_attention.h"

#include <algorithm>
#include <vector>

#include "buffer.h"

namespace llmopt {
namespace {

constexpr int64_t kStoredTokens = 4;  // an item of work on tokens by themselves
constexpr int64_t kTileRows = 48;     // of a tile, unless the heads of one query are more
constexpr int64_t kFewItems = 4;      // a thread: with fewer, items are split
constexpr int64_t kSpansAtOnce = 32;  // of a split context, so that their states stay small

template <class Element>
Element* reserve(Buffer<Element>& buffer, int64_t size) {
  if (buffer.size() < size) buffer = Buffer<Element>(size);
  return buffer.data();
}

// A thread's memory, kept from call to call: pages fresh from the system cost more than the work.
class Workspace {
 public:
  // For so many rows and more, to a multiple of what kernels may compute at a time.
  AttentionScratch scratch(int64_t least_rows, int64_t head_dim) {
    const int64_t rows = (least_rows + kTile - 1) / kTile * kTile;
    uint32_t* words = reserve(words_, (kSpan + rows) * head_dim / 2);
    float* floats = reserve(floats_, rows * (kSpan + state_floats(head_dim) + 2) + 2 * kSpan);
    AttentionScratch scratch{};
    scratch.expanded = reinterpret_cast<char*>(words);
    scratch.queries = words + kSpan * head_dim / 2;
    scratch.scores = floats;
    scratch.key_scales = scratch.scores + rows * kSpan;
    scratch.value_scales = scratch.key_scales + kSpan;
    scratch.partial = scratch.value_scales + kSpan;
    scratch.query_scales = scratch.partial + rows * state_floats(head_dim);
    scratch.weight_scales = scratch.query_scales + rows;
    return scratch;
  }
  float* states(int64_t size) { return reserve(states_, size); }

 private:
  Buffer<uint32_t> words_;
  Buffer<float> floats_, states_;
};

thread_local Workspace workspace;

// One attention over a step: its tiles, the longest work first, so that no thread is left with it at the end.
class PagedAttention {
 public:
  PagedAttention(ThreadPool& pool, const Kernels& kernels, const AttentionShape& shape, const PagedStep& step,
                 const float* qkv, float* out, const LayerCache& cache)
      : pool_(pool), kernels_(kernels.paged), shape_(shape), cache_(cache), shared_(shape.heads / shape.kv_heads) {
    const int64_t width = shape.heads * shape.head_dim, stride = width + 2 * shape.kv_heads * shape.head_dim;
    const int64_t most = std::max<int64_t>(1, kTileRows / shared_);
    for (int64_t sequence = 0; sequence < step.sequences; ++sequence) {
      const int64_t end = step.query_starts[sequence + 1], context = step.contexts[sequence];
      for (int64_t row = step.query_starts[sequence]; row < end; row += most) {
        tiles_.push_back({qkv + row * stride, out + row * width, stride, width, std::min(most, end - row),
                          context - (end - row), context, step.tables + sequence * step.table_width});
      }
    }
    std::stable_sort(tiles_.begin(), tiles_.end(),
                     [this](const QueryTile& a, const QueryTile& b) { return work_of(a) > work_of(b); });
  }

  void run() {
    if (tiles_.empty()) return;
    int64_t work = 0;
    for (const QueryTile& tile : tiles_) work += work_of(tile);
    const int64_t few = kFewItems * pool_.threads(), parts = static_cast<int64_t>(tiles_.size()) * shape_.kv_heads;
    const Spans spans = all_spans();
    if (work_of(tiles_[0]) * few <= work) {
      run_whole(1);
    } else if (parts >= few || pool_.threads() == 1 || spans.last - spans.first == 1) {
      run_whole(shape_.kv_heads);
    } else {
      run_split(spans);
    }
  }

 private:
  int64_t rows_of(const QueryTile& tile) const { return tile.count * shared_; }

  int64_t work_of(const QueryTile& tile) const {
    const Spans spans = spans_of(tile);
    return (spans.last - spans.first) * tile.count;
  }

  Spans spans_of(const QueryTile& tile) const {
    const int64_t first = shape_.window > 0 ? std::max<int64_t>(0, tile.position + 1 - shape_.window) : 0;
    return {first / kSpan, (tile.position + tile.count - 1) / kSpan + 1};
  }

  void attend(const QueryTile& tile, Heads heads, Spans spans, float* states) const {
    kernels_.attend_spans(shape_, cache_, tile, heads, spans, states,
                          workspace.scratch(rows_of(tile), shape_.head_dim));
  }

  // An item is a tile and all of its key heads, or one of `parts` equal runs of them.
  void run_whole(int64_t parts) {
    pool_.run(static_cast<int64_t>(tiles_.size()) * parts, [&](int64_t item) {
      const QueryTile& tile = tiles_[static_cast<size_t>(item / parts)];
      const int64_t heads = shape_.kv_heads / parts, first = item % parts * heads;
      float* states = workspace.states(heads * rows_of(tile) * state_floats(shape_.head_dim));
      attend(tile, {first, first + heads}, spans_of(tile), states);
      kernels_.finish(shape_, tile, {first, first + heads}, states);
    });
  }

  // Each span by itself, then their states merged in order: the same additions as in run_whole.
  void run_split(Spans all) {
    const int64_t parts = static_cast<int64_t>(tiles_.size()) * shape_.kv_heads, size = largest_states();
    float* merged = workspace.states((1 + kSpansAtOnce) * parts * size);
    float* single = merged + parts * size;
    for (int64_t from = all.first; from < all.last; from += kSpansAtOnce) {
      const int64_t to = std::min(all.last, from + kSpansAtOnce);
      pool_.run(parts * (to - from), [&](int64_t item) {
        const QueryTile& tile = tile_of(item % parts);
        const Spans spans = spans_of(tile);
        const int64_t span = from + item / parts;
        if (span < spans.first || span >= spans.last) return;
        attend(tile, head_of(item % parts), {span, span + 1}, single + item * size);
      });
      pool_.run(parts, [&](int64_t part) {
        const QueryTile& tile = tile_of(part);
        const Spans spans = spans_of(tile);
        float* states = merged + part * size;
        if (from == all.first) attend(tile, head_of(part), {0, 0}, states);  // has seen nothing
        for (int64_t span = std::max(from, spans.first); span < std::min(to, spans.last); ++span) {
          const float* next = single + ((span - from) * parts + part) * size;
          kernels_.merge_states(states, next, rows_of(tile), shape_.head_dim);
        }
        if (to == all.last) kernels_.finish(shape_, tile, head_of(part), states);
      });
    }
  }

  // Of run_split, where a part is one key head of one tile.
  const QueryTile& tile_of(int64_t part) const { return tiles_[static_cast<size_t>(part / shape_.kv_heads)]; }
  Heads head_of(int64_t part) const { return {part % shape_.kv_heads, part % shape_.kv_heads + 1}; }

  int64_t largest_states() const {
    int64_t rows = 0;
    for (const QueryTile& tile : tiles_) rows = std::max(rows, rows_of(tile));
    return rows * state_floats(shape_.head_dim);
  }

  Spans all_spans() const {
    Spans all = spans_of(tiles_[0]);
    for (const QueryTile& tile : tiles_) {
      const Spans spans = spans_of(tile);
      all = {std::min(all.first, spans.first), std::max(all.last, spans.last)};
    }
    return all;
  }

  ThreadPool& pool_;
  const PagedKernels& kernels_;
  const AttentionShape& shape_;
  const LayerCache& cache_;
  int64_t shared_;  // query heads of one key head
  std::vector<QueryTile> tiles_;
};

}  // namespace

void rotate_and_store(ThreadPool& pool, const Kernels& kernels, const AttentionShape& shape, const PagedStep& step,
                      float* qkv, const LayerCache& cache) {
  pool.run((step.tokens + kStoredTokens - 1) / kStoredTokens, [&](int64_t item) {
    const int64_t first = item * kStoredTokens, last = std::min(step.tokens, first + kStoredTokens);
    kernels.paged.rotate_and_store(shape, step, qkv, cache, first, last);
  });
}

void attend_paged(ThreadPool& pool, const Kernels& kernels, const AttentionShape& shape, const PagedStep& step,
                  const float* qkv, float* out, const LayerCache& cache) {
  PagedAttention(pool, kernels, shape, step, qkv, out, cache).run();
}

}  // namespace llmopt
