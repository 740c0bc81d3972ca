// AVX2 with FMA: vectors of 256 bits.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace llmopt {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kPanelRows = 6;
constexpr int kActivationOffset = 0;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

template <int kBits>
inline Floats to_float(Words word, int j) {
  return __builtin_convertvector(reinterpret_cast<Ints>(word << (32 - kBits * (j + 1))) >> (32 - kBits), Floats);
}

// Widened to 16 bits, because the instruction that multiplies bytes saturates its sums.
inline Ints dot(Ints sum, uint32_t x, Words w) {
  const __m256i words = reinterpret_cast<__m256i>(w), four = _mm256_set1_epi32(static_cast<int>(x));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(words, 8), _mm256_srai_epi16(four, 8));
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8),
                                         _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
  return sum + reinterpret_cast<Ints>(odd) + reinterpret_cast<Ints>(even);
}

}  // namespace
}  // namespace llmopt

#include "kernels_impl.h"

namespace llmopt {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels =
      make_kernels("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });
  return &kernels;
}

}  // namespace llmopt
#else
const llmopt::Kernels* llmopt::avx2_kernels() { return nullptr; }
#endif
