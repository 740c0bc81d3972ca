// The states of a softmax that is taken span by span (paged_cache.h describes them), with powers of two in place of e.
// Included as kernels_impl.h is.

namespace llmopt {
namespace {

constexpr float kLowest = -3.0e38F;  // no score is less; finite, because the difference of two infinities is no number

// 2^x for x <= 0, within 2e-7 of it, and 0 below 2^-126. The polynomial is fitted to 2^x on [-1/2, 1/2].
inline Floats power_of_two(Floats x) {
  const Floats shifted = x + 0x1.8p23F;  // its lowest bits are x, rounded to an integer
  const Floats fraction = x - (shifted - 0x1.8p23F);
  Floats power = broadcast(1.326472715e-3F);
  power = power * fraction + 9.671512643e-3F;
  power = power * fraction + 5.550733743e-2F;
  power = power * fraction + 2.402224209e-1F;
  power = power * fraction + 6.931469776e-1F;
  power = power * fraction + 1.0F;
  const Floats whole = reinterpret_cast<Floats>((reinterpret_cast<Words>(shifted) << 23) + (127U << 23));
  return x < -126.0F ? Floats{} : power * whole;
}

inline void clear_state(float* state, int64_t head_dim) {
  std::memset(state, 0, static_cast<size_t>(head_dim + kGroup) * sizeof *state);
  state[head_dim + kGroup] = kLowest;
}

// Never inlined, so that its products and sums are fused in the same way wherever states are merged.
__attribute__((noinline)) void merge_states(float* state, const float* next, int64_t rows, int64_t head_dim) {
  const int64_t sums = head_dim + kGroup;  // of values and of weights
  for (int64_t row = 0; row < rows; ++row, state += state_floats(head_dim), next += state_floats(head_dim)) {
    const float difference = state[sums] - next[sums];
    const float power = power_of_two(broadcast(difference < 0 ? difference : -difference))[0];
    const float kept = difference < 0 ? power : 1.0F, added = difference < 0 ? 1.0F : power;
    for (int64_t i = 0; i < sums; i += kLanes) {
      store(state + i, load<Floats>(state + i) * kept + load<Floats>(next + i) * added, kLanes);
    }
    if (difference < 0) state[sums] = next[sums];
  }
}

void finish(const AttentionShape& shape, const QueryTile& tile, Heads heads, const float* states) {
  const int64_t shared = shape.heads / shape.kv_heads, dim = shape.head_dim;
  for (int64_t head = heads.first; head < heads.last; ++head) {
    for (int64_t row = 0; row < tile.count * shared; ++row, states += state_floats(dim)) {
      Floats weights{};
      for (int64_t i = 0; i < kGroup; i += kLanes) weights += load<Floats>(states + dim + i);
      const float inverse = 1.0F / sum_of(weights);
      float* out = tile.out + row / shared * tile.out_stride + (head * shared + row % shared) * dim;
      for (int64_t i = 0; i < dim; i += kLanes) store(out + i, load<Floats>(states + i) * inverse, kLanes);
    }
  }
}

}  // namespace
}  // namespace llmopt
