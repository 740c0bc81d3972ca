// What attention over a paged cache of bfloat16 or 8-bit numbers works on; README.md describes the layout. Like
// kernels.h, this header is read by the files of every instruction set and uses no standard containers.
#pragma once

#include <cstdint>

namespace llmopt {

constexpr int64_t kGroup = 16;          // keys that lie side by side, and a divisor of every block size
constexpr int64_t kSpan = 128;          // keys whose softmax is taken at a time; spans begin at multiples of it
constexpr int64_t kLine = 64;           // bytes that a processor reads at a time
constexpr int64_t kMostChannels = 256;  // of a head

enum class CacheKind { kBFloat16, kInt8, kFp8 };

// What is the same for all steps of a layer.
struct AttentionShape {
  int64_t heads, kv_heads, head_dim;
  int64_t rotated;  // channels at the head's beginning that rope rotates
  int64_t block_size;
  int64_t window;  // a token sees itself and the window - 1 tokens before it; 0 for all
  float scale, eps;
  const float* query_norm;  // [head_dim], weights of an RMS norm of each head before rope, or null
  const float* key_norm;    // likewise
  CacheKind kind;
};

// One layer's keys [blocks][kv_heads][head_dim / 2][block_size][2] and values [blocks][kv_heads][block_size / 2]
// [head_dim][2]: bfloat16, int8 or fp8 (e4m3).
struct LayerCache {
  void* keys;
  void* values;
  float* key_scales;  // [blocks][kv_heads][block_size], of int8 only
  float* value_scales;
};

// Where the tokens of one step stand in the cache; rows of one sequence are consecutive, oldest first.
struct PagedStep {
  int64_t sequences, tokens, table_width;
  const int32_t* query_starts;  // [sequences + 1], a sequence's first row
  const int32_t* contexts;      // [sequences], tokens in the cache once this step's are written
  const int32_t* tables;        // [sequences][table_width], numbers of blocks
  const int64_t* slots;         // [tokens], block * block_size + offset
  const float* cos;             // [tokens][rotated / 2]
  const float* sin;             // likewise
};

// Consecutive queries of one sequence.
struct QueryTile {
  const float* queries;  // the first one's heads, [heads][head_dim]
  float* out;            // likewise
  int64_t query_stride;  // floats from one query to the next
  int64_t out_stride;
  int64_t count;           // of queries
  int64_t position;        // of the first in its sequence
  int64_t context;         // tokens of the sequence in the cache
  const int32_t* table;    // of the sequence's blocks
};

// Key heads first .. last - 1.
struct Heads {
  int64_t first, last;
};

// Spans first .. last - 1 of a sequence.
struct Spans {
  int64_t first, last;
};

// The state of a softmax: sums of weighted values [head_dim], sums of weights [kGroup], the largest score. A tile has
// one for each of its rows: a query head of a query, ordered by key head, then by query. (The function is static for
// the reason that kernels.h gives.)
static constexpr int64_t state_floats(int64_t head_dim) { return head_dim + 2 * kGroup; }

// A thread's memory for the rows of one key head.
struct AttentionScratch {
  uint32_t* queries;     // [rows][head_dim / 2], pairs of 16 bits
  float* query_scales;   // [rows]
  float* scores;         // [rows][kSpan]; they become weights, pairs of 16 bits at the beginning of each row
  float* weight_scales;  // [rows]
  float* partial;        // [rows][state_floats(head_dim)], of one span
  char* expanded;        // [kSpan][head_dim], keys or values of a span in bfloat16
  float* key_scales;     // [kSpan], of the span's keys
  float* value_scales;   // likewise
};

// What an instruction set offers for it.
struct PagedKernels {
  // For tokens first .. last - 1: norms and rotates queries (in place) and keys, and puts keys and values into the
  // cache.
  void (*rotate_and_store)(const AttentionShape&, const PagedStep&, float* qkv, const LayerCache&, int64_t first,
                           int64_t last);
  // The states of a tile's rows over these spans.
  void (*attend_spans)(const AttentionShape&, const LayerCache&, const QueryTile&, Heads, Spans, float* states,
                       const AttentionScratch&);
  // Adds to states what `next` saw, the spans that follow.
  void (*merge_states)(float* states, const float* next, int64_t rows, int64_t head_dim);
  // out = sums of weighted values / sums of weights.
  void (*finish)(const AttentionShape&, const QueryTile&, Heads, const float* states);
};

}  // namespace llmopt
