// The threads and the instruction set that work is done with, as Python holds them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "multiply.h"
#include "paged_attention.h"
#include "pool.h"

namespace llmopt {

// Names of those that this processor has, fastest first.
std::vector<std::string> instruction_sets();

// Tensors cross as addresses: exchanging them costs more than a small product.
class Multiplier {
 public:
  // Throws std::invalid_argument where there are no such threads or instructions; "auto" takes the fastest.
  Multiplier(int threads, const std::string& instruction_set);

  int threads() const { return pool_.threads(); }
  std::string instruction_set() const { return kernels_.name; }

  // x and y are addresses of float32 rows.
  void multiply(const PackedWeight& weight, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y,
                int64_t y_stride) {
    if (rows == 0 || weight.out() == 0) return;
    llmopt::multiply(pool_, kernels_, weight,
                     {reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), rows, x_stride, y_stride});
  }

  // Addresses of float32 queries and out [sequences, heads, head_dim], keys and values [blocks, block_size, kv_heads,
  // head_dim], int32 tables [sequences, table_width] and contexts [sequences].
  void attend(uintptr_t queries, uintptr_t out, uintptr_t keys, uintptr_t values, uintptr_t tables, uintptr_t contexts,
              int64_t sequences, int64_t table_width, int64_t heads, int64_t kv_heads, int64_t head_dim,
              int64_t block_size, int64_t window, float scale);

  // Addresses of float32 qkv [tokens, (heads + 2 kv_heads) * head_dim] and out [tokens, heads * head_dim].
  void rotate_and_store(const AttentionShape& shape, const PagedStep& step, uintptr_t qkv, const LayerCache& cache) {
    llmopt::rotate_and_store(pool_, kernels_, shape, step, reinterpret_cast<float*>(qkv), cache);
  }

  void attend_paged(const AttentionShape& shape, const PagedStep& step, uintptr_t qkv, uintptr_t out,
                    const LayerCache& cache) {
    llmopt::attend_paged(pool_, kernels_, shape, step, reinterpret_cast<const float*>(qkv),
                         reinterpret_cast<float*>(out), cache);
  }

  // As multiply(), with activations rounded to 8 bits, or to 16 where the weight is dense.
  void multiply_rounded(const Part& part, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t y, int64_t y_stride) {
    if (rows == 0 || part.out() == 0) return;
    Linear({part}).run(pool_, kernels_, activations_,
                       {reinterpret_cast<const float*>(x), x_stride, part.in(), nullptr, nullptr, 0}, rows,
                       {reinterpret_cast<float*>(y), y_stride, false});
  }

  const Kernels& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }

  // Operations a second on 8-bit numbers with nothing to load: what all threads reach together, for about 10 ms.
  double peak_int8_ops();

 private:
  const Kernels& kernels_;
  ThreadPool pool_;
  Activations activations_;
};

}  // namespace llmopt
