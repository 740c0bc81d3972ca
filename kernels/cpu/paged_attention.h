#pragma once

#include "kernels.h"
#include "paged_cache.h"
#include "pool.h"

namespace llmopt {

// What stands between a layer's product to [q | k | v] and the product that takes its attention: the first of these,
// then the second. qkv is [tokens][(heads + 2 kv_heads) head_dim].

// Norms (where the shape has weights for it) and rotates queries, which stay in qkv, and keys; puts keys and values
// into the slots of the cache, rounded to its kind.
void rotate_and_store(ThreadPool& pool, const Kernels& kernels, const AttentionShape& shape, const PagedStep& step,
                      float* qkv, const LayerCache& cache);

// Causal attention of the queries in qkv over the cache, to out [tokens][heads * head_dim]. A token's result is the
// same to the bit whatever step it is computed in, alone or with others.
void attend_paged(ThreadPool& pool, const Kernels& kernels, const AttentionShape& shape, const PagedStep& step,
                  const float* qkv, float* out, const LayerCache& cache);

}  // namespace llmopt
