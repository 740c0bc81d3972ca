// AVX-512 (F, BW, VL, DQ): vectors of 512 bits; with VNNI where the including file is compiled for it.
#include <immintrin.h>

#include "kernels.h"

namespace llmopt {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kPanelRows = 12;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

template <int kBits>
inline Floats to_float(Words word, int j) {
  if constexpr (kBits == 4) {
    // A permutation reads only the lowest four bits of an index, so it is a table of all 4-bit codes.
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> (4 * j)), table);
  } else {
    return __builtin_convertvector(reinterpret_cast<Ints>(word << (24 - 8 * j)) >> 24, Floats);
  }
}

#if defined(__AVX512VNNI__)

constexpr int kActivationOffset = 128;  // vpdpbusd takes one operand unsigned

inline Ints dot(Ints sum, uint32_t x, Words w) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                    _mm512_set1_epi32(static_cast<int>(x)),
                                                    reinterpret_cast<__m512i>(w)));
}

#else

constexpr int kActivationOffset = 0;

// Widened to 16 bits, because the instruction that multiplies bytes saturates its sums.
inline Ints dot(Ints sum, uint32_t x, Words w) {
  const __m512i words = reinterpret_cast<__m512i>(w), four = _mm512_set1_epi32(static_cast<int>(x));
  const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(words, 8), _mm512_srai_epi16(four, 8));
  const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(words, 8), 8),
                                         _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8));
  return sum + reinterpret_cast<Ints>(odd) + reinterpret_cast<Ints>(even);
}

#endif

inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace
}  // namespace llmopt

#include "kernels_impl.h"
