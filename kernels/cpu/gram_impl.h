// Products of panels of columns, see gram_kernels.h; what they ask of an instruction set is dot_bfloat16() and
// store_bfloat16().

namespace llmopt {
namespace {

// 24 sums and what they are made of fill the 32 registers of AVX-512; others have 16.
constexpr int kGramRows = kVectorBytes == 64 ? 8 : 4, kGramColumns = 3;

inline Words as_bfloat16(const float* from, int64_t count) {
  uint16_t halves[kLanes];
  store_bfloat16(halves, load_some(from, count));
  return reinterpret_cast<Words>(widened(halves));
}

void arrange_gram(const float* x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t* panel) {
  for (int64_t row = 0; row < rows; row += 2, panel += kGramPanel) {
    const float* one = x + row * x_stride;
    const float* other = one + x_stride;
    for (int64_t i = 0; i < kGramPanel; i += kLanes) {
      Words pair = as_bfloat16(one + i, columns - i);
      if (row + 1 < rows) pair |= as_bfloat16(other + i, columns - i) << 16;
      std::memcpy(panel + i, &pair, sizeof pair);
    }
  }
}

void multiply_gram(const uint32_t* a, const uint32_t* b, int64_t pairs, float* sums) {
  for (int64_t row = 0; row < kGramPanel; row += kGramRows) {
    for (int64_t column = 0; column < kGramPanel; column += kGramColumns * kLanes) {
      Floats sum[kGramRows][kGramColumns] = {};
      for (int64_t i = 0; i < pairs; ++i) {
        const uint32_t* left = a + i * kGramPanel + row;
        const uint32_t* right = b + i * kGramPanel + column;
        Words value[kGramColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kGramColumns; ++j) value[j] = load<Words>(right + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kGramRows; ++r) {
          const Words factor = Words{} + left[r];
#pragma GCC unroll 4
          for (int j = 0; j < kGramColumns; ++j) sum[r][j] = dot_bfloat16(sum[r][j], factor, value[j]);
        }
      }
      for (int r = 0; r < kGramRows; ++r) {
        for (int j = 0; j < kGramColumns; ++j) {
          store(sums + (row + r) * kGramPanel + column + j * kLanes, sum[r][j], kLanes);
        }
      }
    }
  }
}

constexpr GramKernels make_gram_kernels() { return {arrange_gram, multiply_gram}; }

}  // namespace
}  // namespace llmopt
