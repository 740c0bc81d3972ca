// A whole decoder: all layers of one step of the continuous batch in one call.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "paged_attention.h"

namespace llmopt {

struct DecoderShape {
  int64_t hidden, heads, kv_heads, head_dim, rotated, block_size;
  float eps;
  CacheKind cache;
};

struct DecoderLayer {
  Linear qkv, output;
  GatedLinear gate_up;
  Linear down;
  const float *input_norm, *mlp_norm;  // [hidden]
  const float *query_norm, *key_norm;  // [head_dim], or null
  int64_t window;                      // 0 for none
  LayerCache memory;
};

// An embedding table [tokens][hidden] of float32, bfloat16 or float16.
struct EmbeddingTable {
  enum class Kind { kFloat32, kBFloat16, kFloat16 } kind;
  const void* rows;
};

class Decoder {
 public:
  Decoder(ThreadPool& pool, const Kernels& kernels, const DecoderShape& shape, EmbeddingTable embedding,
          const float* final_norm, Linear head, const float* frequencies);

  void add_layer(DecoderLayer layer) { layers_.push_back(std::move(layer)); }

  // The normed last hidden states [tokens][hidden]; keys and values of the tokens are in the cache afterwards.
  // `step.cos` and `step.sin` are filled here. tokens and positions are [step.tokens].
  void hidden(PagedStep step, const int64_t* tokens, const int64_t* positions, float* out);
  // The same, and then the head for some rows: logits [count][vocabulary].
  void logits(PagedStep step, const int64_t* tokens, const int64_t* positions, const int64_t* rows, int64_t count,
              float* out);

  const DecoderShape& shape() const { return shape_; }

 private:
  void embed(const int64_t* tokens, int64_t count);
  void rotate(PagedStep& step, const int64_t* positions);
  void run_layers(PagedStep& step, const int64_t* tokens, const int64_t* positions);
  void run_layer(const DecoderLayer& layer, const PagedStep& step);

  ThreadPool& pool_;
  const Kernels& kernels_;
  DecoderShape shape_;
  EmbeddingTable embedding_;
  const float* final_norm_;
  Linear head_;
  const float* frequencies_;  // [rotated / 2]
  std::vector<DecoderLayer> layers_;
  Activations activations_, others_;
  Buffer<float> x_, qkv_, attended_, gated_, last_, cos_, sin_;
};

}  // namespace llmopt
