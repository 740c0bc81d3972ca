#include "decoder.h"

#include <cmath>
#include <cstring>
#include <utility>

namespace llmopt {
namespace {

void grow(Buffer<float>& buffer, int64_t size) {
  if (buffer.size() < size) buffer = Buffer<float>(size + size / 4);
}

}  // namespace

Decoder::Decoder(ThreadPool& pool, const Kernels& kernels, const DecoderShape& shape, EmbeddingTable embedding,
                 const float* final_norm, Linear head, const float* frequencies)
    : pool_(pool),
      kernels_(kernels),
      shape_(shape),
      embedding_(embedding),
      final_norm_(final_norm),
      head_(std::move(head)),
      frequencies_(frequencies) {}

void Decoder::embed(const int64_t* tokens, int64_t count) {
  const int64_t hidden = shape_.hidden;
  grow(x_, count * hidden);
  for (int64_t row = 0; row < count; ++row) {
    float* x = x_.data() + row * hidden;
    if (embedding_.kind == EmbeddingTable::Kind::kFloat32) {
      std::memcpy(x, static_cast<const float*>(embedding_.rows) + tokens[row] * hidden,
                  static_cast<size_t>(hidden) * 4);
    } else {
      kernels_.dense.widen(static_cast<const uint16_t*>(embedding_.rows) + tokens[row] * hidden,
                           embedding_.kind == EmbeddingTable::Kind::kBFloat16, hidden, x);
    }
  }
}

void Decoder::rotate(PagedStep& step, const int64_t* positions) {
  const int64_t half = shape_.rotated / 2;
  grow(cos_, step.tokens * half);
  grow(sin_, step.tokens * half);
  for (int64_t row = 0; row < step.tokens; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[row]) * frequencies_[i];
      cos_[row * half + i] = std::cos(angle);
      sin_[row * half + i] = std::sin(angle);
    }
  }
  step.cos = cos_.data();
  step.sin = sin_.data();
}

void Decoder::run_layer(const DecoderLayer& layer, const PagedStep& step) {
  const int64_t hidden = shape_.hidden, width = shape_.heads * shape_.head_dim, rows = step.tokens;
  const AttentionShape attention{shape_.heads,
                                 shape_.kv_heads,
                                 shape_.head_dim,
                                 shape_.rotated,
                                 shape_.block_size,
                                 layer.window,
                                 1.0F / std::sqrt(static_cast<float>(shape_.head_dim)),
                                 shape_.eps,
                                 layer.query_norm,
                                 layer.key_norm,
                                 shape_.cache};
  layer.qkv.run(pool_, kernels_, activations_, {x_.data(), hidden, hidden, nullptr, layer.input_norm, shape_.eps}, rows,
                {qkv_.data(), layer.qkv.out(), false});
  rotate_and_store(pool_, kernels_, attention, step, qkv_.data(), layer.memory);
  attend_paged(pool_, kernels_, attention, step, qkv_.data(), attended_.data(), layer.memory);
  layer.output.run(pool_, kernels_, activations_, {attended_.data(), width, width, nullptr, nullptr, 0}, rows,
                   {x_.data(), hidden, true});
  const int64_t inner = layer.gate_up.out();
  layer.gate_up.run(pool_, kernels_, activations_, others_,
                    {x_.data(), hidden, hidden, nullptr, layer.mlp_norm, shape_.eps}, rows,
                    {gated_.data(), inner, false});
  layer.down.run(pool_, kernels_, activations_, {gated_.data(), inner, inner, nullptr, nullptr, 0}, rows,
                 {x_.data(), hidden, true});
}

void Decoder::run_layers(PagedStep& step, const int64_t* tokens, const int64_t* positions) {
  embed(tokens, step.tokens);
  rotate(step, positions);
  for (const DecoderLayer& layer : layers_) {
    grow(qkv_, step.tokens * layer.qkv.out());
    grow(attended_, step.tokens * layer.output.in());
    grow(gated_, step.tokens * layer.gate_up.out());
    run_layer(layer, step);
  }
}

void Decoder::hidden(PagedStep step, const int64_t* tokens, const int64_t* positions, float* out) {
  run_layers(step, tokens, positions);
  pool_.run(step.tokens, [&](int64_t row) {
    const int64_t at = row * shape_.hidden;
    kernels_.integer.norm_row(x_.data() + at, final_norm_, shape_.eps, shape_.hidden, out + at);
  });
}

void Decoder::logits(PagedStep step, const int64_t* tokens, const int64_t* positions, const int64_t* rows,
                     int64_t count, float* out) {
  run_layers(step, tokens, positions);
  const int64_t hidden = shape_.hidden;
  const float* last = x_.data();
  if (count != step.tokens) {  // rows are in order, so that all of them are already in place
    grow(last_, count * hidden);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(last_.data() + i * hidden, x_.data() + rows[i] * hidden, static_cast<size_t>(hidden) * sizeof(float));
    }
    last = last_.data();
  }
  head_.run(pool_, kernels_, activations_, {last, hidden, hidden, nullptr, final_norm_, shape_.eps}, count,
            {out, head_.out(), false});
}

}  // namespace llmopt
