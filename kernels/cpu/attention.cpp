#include "attention.h"

#include <algorithm>

#include "buffer.h"

namespace llmopt {

void attend(ThreadPool& pool, const Kernels& kernels, const DecodeBatch& batch) {
  const int64_t shared = batch.heads / batch.kv_heads;
  pool.run(batch.sequences * batch.kv_heads, [&](int64_t item) {
    const int64_t sequence = item / batch.kv_heads, head = item % batch.kv_heads;
    const int64_t context = batch.contexts[sequence];
    const int64_t first = batch.window > 0 ? std::max<int64_t>(0, context - batch.window) : 0;
    const int64_t query = (sequence * batch.heads + head * shared) * batch.head_dim;
    thread_local Buffer<float> scores;
    if (scores.size() < shared * (context - first)) scores = Buffer<float>(2 * shared * (context - first));
    kernels.attend({batch.queries + query, batch.out + query, batch.keys + head * batch.head_dim,
                    batch.values + head * batch.head_dim, batch.tables + sequence * batch.table_width, first, context,
                    shared, batch.head_dim, batch.kv_heads * batch.head_dim, batch.block_size, batch.scale},
                   scores.data());
  });
}

}  // namespace llmopt
