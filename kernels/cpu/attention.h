#pragma once

#include "kernels.h"
#include "pool.h"

namespace llmopt {

// Sequences with one query each (decode) over a paged cache of float32 keys and values,
// [blocks][block_size][kv_heads][head_dim].
struct DecodeBatch {
  const float* queries;     // [sequences][heads][head_dim]
  float* out;               // likewise
  const float* keys;
  const float* values;
  const int32_t* tables;    // [sequences][table_width]
  const int32_t* contexts;  // [sequences], tokens in the cache, the query's own included
  int64_t sequences, table_width, heads, kv_heads, head_dim, block_size;
  int64_t window;  // a query sees itself and the window - 1 tokens before it; 0 for all
  float scale;
};

// Spreads sequences and key heads over the threads of the pool.
void attend(ThreadPool& pool, const Kernels& kernels, const DecodeBatch& batch);

}  // namespace llmopt
