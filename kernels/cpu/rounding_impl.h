// Rows of activations as products want to meet them: normed, in the weight's order, rounded to 8 bits in steps. Included
// as integer_impl.h is.

#include "integer.h"

namespace llmopt {
namespace {

inline float inverse_rms(const float* x, int64_t width, float eps) {
  Floats squares{};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats value = load_some(x + i, width - i);
    squares += value * value;
  }
  return 1.0F / __builtin_sqrtf(sum_of(squares) / static_cast<float>(width) + eps);
}

void norm_row(const float* x, const float* norm, float eps, int64_t width, float* y) {
  const float inverse = inverse_rms(x, width, eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    store(y + i, load_some(x + i, width - i) * inverse * load_some(norm + i, width - i), width - i);
  }
}

// One row as the weight wants to meet it: normed, in its order.
inline const float* arrange_row(const RoundingInput& input, const float* x, int64_t in, float* scratch) {
  if (!input.norm && !input.order) return x;
  const float inverse = input.norm ? inverse_rms(x, input.width, input.eps) : 1.0F;
  if (!input.order) {
    for (int64_t i = 0; i < in; i += kLanes) {
      store(scratch + i, load_some(x + i, in - i) * inverse * load_some(input.norm + i, in - i), in - i);
    }
    return scratch;
  }
  for (int64_t i = 0; i < in; ++i) {
    const int32_t from = input.order[i];
    scratch[i] = from < 0 ? 0.0F : input.norm ? x[from] * inverse * input.norm[from] : x[from];
  }
  return scratch;
}

// Four codes to a word; the words of one row stand `stride` apart.
inline void store_codes(Words codes, int64_t count, uint32_t* to, int64_t stride) {
  uint32_t words[kLanes / 4];
  store_bytes(words, codes);
#pragma GCC unroll 4
  for (int64_t word = 0; word < kLanes / 4; ++word) {
    if (4 * word < count) to[word * stride] = words[word];
  }
}

// A step of one row: codes absmax / 127, halves to even. A step that holds a NaN or an infinity spoils what it meets by
// its scale; its codes mean nothing, and neither would their sum, which might not fit either.
inline void round_step(const float* x, int64_t count, uint32_t* codes, int64_t stride, float* scale, int32_t* sum,
                       float* total) {
  Words codes_sum{};
  const int64_t whole = count / kLanes * kLanes;
  const float largest = largest_magnitude(x, count);
  const bool nothing = largest < 1e-30F;  // its inverse might be infinite, and what it scales is as good as zero
  const float inverse = nothing ? 0.0F : 127.0F / largest;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Words code = reinterpret_cast<Words>(load<Floats>(x + i) * inverse + kRounder) - 0x4B400000;
    codes_sum += code;
    store_codes(code, kLanes, codes + i / 4 * stride, stride);
  }
  if (whole < count) {
    const Words code = reinterpret_cast<Words>(load_some(x + whole, count - whole) * inverse + kRounder) - 0x4B400000;
    codes_sum += code;
    store_codes(code, count - whole, codes + whole / 4 * stride, stride);
  }
  *scale = nothing ? 1.0F : largest / 127.0F;
  const int32_t whole_sum = largest <= __FLT_MAX__ ? static_cast<int32_t>(sum_of(codes_sum)) : 0;
  *sum = -8 * whole_sum;
  *total = *scale * static_cast<float>(whole_sum);
}

void round_block(const RoundingInput& input, const Rounded& to, int64_t block, float* scratch) {
  const int64_t rows = to.block_rows, words = to.in / 4, step_words = words / to.steps;
  const int64_t row_stride = to.wide ? words : 1, word_stride = to.wide ? 1 : rows;
  for (int64_t r = 0; r < to.rows_in(block); ++r) {
    const float* x = arrange_row(input, input.x + (block * rows + r) * input.x_stride, to.in, scratch);
    uint32_t* codes = to.codes + block * words * rows + r * row_stride;
    for (int64_t step = 0; step < to.steps; ++step) {
      const int64_t at = (block * to.steps + step) * rows + r, word = step * step_words;
      round_step(x + 4 * word, 4 * step_words, codes + word * word_stride, word_stride, to.scales + at, to.sums + at,
                 to.totals + at);
    }
  }
}

}  // namespace
}  // namespace llmopt
