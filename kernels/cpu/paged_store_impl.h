// Norm, rotation and storing of a step's queries, keys and values. Included as kernels_impl.h is.

namespace llmopt {
namespace {

// head / sqrt(mean of squares + eps) · weight, in place.
inline void norm_head(float* head, const float* weight, int64_t dim, float eps) {
  Floats squares{};
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Floats value = load<Floats>(head + i);
    squares += value * value;
  }
  const float inverse = 1.0F / __builtin_sqrtf(sum_of(squares) / static_cast<float>(dim) + eps);
  for (int64_t i = 0; i < dim; i += kLanes) {
    store(head + i, load<Floats>(head + i) * inverse * load<Floats>(weight + i), kLanes);
  }
}

// Element i turns together with element i + half.
inline void rotate_head(float* head, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Floats first = load<Floats>(head + i), second = load<Floats>(head + half + i);
    const Floats c = load<Floats>(cos + i), s = load<Floats>(sin + i);
    store(head + i, first * c - second * s, kLanes);
    store(head + half + i, second * c + first * s, kLanes);
  }
  for (; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cos[i] - second * sin[i];
    head[half + i] = second * cos[i] + first * sin[i];
  }
}

// `plane` is the part of the cache that holds one head of one block. A pair of channels of a key stands together, the
// next pair one row of the block's keys further.
template <class Code>
inline void put_key(const AttentionShape& shape, const Code* codes, int64_t offset, Code* plane) {
  for (int64_t i = 0; i < shape.head_dim; i += 2) {
    std::memcpy(plane + i * shape.block_size + offset * 2, codes + i, 2 * sizeof(Code));
  }
}

// A channel of a value stands together with that of the token's neighbour.
template <class Code>
inline void put_value(const AttentionShape& shape, const Code* codes, int64_t offset, Code* plane) {
  Code* to = plane + offset / 2 * 2 * shape.head_dim + offset % 2;
  for (int64_t i = 0; i < shape.head_dim; ++i) to[2 * i] = codes[i];
}

// `plane` counts [blocks][kv_heads].
void store_head(const AttentionShape& shape, const LayerCache& cache, int64_t plane, int64_t offset, const float* key,
                const float* value) {
  const int64_t dim = shape.head_dim, start = plane * shape.block_size * dim;
  if (shape.kind == CacheKind::kBFloat16) {
    uint16_t codes[kMostChannels];
    encode_bfloat16(key, dim, codes);
    put_key(shape, codes, offset, static_cast<uint16_t*>(cache.keys) + start);
    encode_bfloat16(value, dim, codes);
    put_value(shape, codes, offset, static_cast<uint16_t*>(cache.values) + start);
    return;
  }
  const auto encode = shape.kind == CacheKind::kInt8 ? encode_int8 : encode_fp8;
  uint8_t codes[kMostChannels];
  const float key_scale = encode(key, dim, codes);
  put_key(shape, codes, offset, static_cast<uint8_t*>(cache.keys) + start);
  const float value_scale = encode(value, dim, codes);
  put_value(shape, codes, offset, static_cast<uint8_t*>(cache.values) + start);
  if (shape.kind == CacheKind::kInt8) {
    cache.key_scales[plane * shape.block_size + offset] = key_scale;
    cache.value_scales[plane * shape.block_size + offset] = value_scale;
  }
}

// Begins to bring a token's place into the cache of the core: a key lies on as many lines as it has pairs of channels.
// Always inlined, because GCC 12 takes a call of a function that does nothing else for one without effect.
__attribute__((always_inline)) inline void fetch_place(const AttentionShape& shape, const LayerCache& cache,
                                                       int64_t slot) {
  const int64_t pair_bytes = shape.kind == CacheKind::kBFloat16 ? 4 : 2, dim = shape.head_dim;
  const int64_t offset = slot % shape.block_size, row = shape.block_size * pair_bytes;
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    const int64_t plane = (slot / shape.block_size * shape.kv_heads + head) * dim / 2 * row;
    const char* key = static_cast<const char*>(cache.keys) + plane + offset * pair_bytes;
    const char* value = static_cast<const char*>(cache.values) + plane + offset / 2 * dim * pair_bytes;
    for (int64_t pair = 0; pair < dim / 2; ++pair) __builtin_prefetch(key + pair * row, 1, 2);
    for (int64_t i = 0; i < dim * pair_bytes; i += kLine) __builtin_prefetch(value + i, 1, 2);
  }
}

void rotate_and_store(const AttentionShape& shape, const PagedStep& step, float* qkv, const LayerCache& cache,
                      int64_t first, int64_t last) {
  const int64_t dim = shape.head_dim, half = shape.rotated / 2, turned = shape.heads + shape.kv_heads;
  fetch_place(shape, cache, step.slots[first]);
  for (int64_t token = first; token < last; ++token) {
    const bool jumps = token + 1 < last && step.slots[token + 1] != step.slots[token] + 1;
    if (jumps) fetch_place(shape, cache, step.slots[token + 1]);
    float* row = qkv + token * (turned + shape.kv_heads) * dim;
    for (int64_t head = 0; head < turned; ++head) {
      const float* norm = head < shape.heads ? shape.query_norm : shape.key_norm;
      if (norm) norm_head(row + head * dim, norm, dim, shape.eps);
      rotate_head(row + head * dim, step.cos + token * half, step.sin + token * half, half);
    }
    const int64_t block = step.slots[token] / shape.block_size, offset = step.slots[token] % shape.block_size;
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      const float* key = row + (shape.heads + head) * dim;
      store_head(shape, cache, block * shape.kv_heads + head, offset, key, key + shape.kv_heads * dim);
    }
  }
}

}  // namespace
}  // namespace llmopt
