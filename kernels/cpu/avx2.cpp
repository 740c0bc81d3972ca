// AVX2 with FMA: vectors of 256 bits.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace llmopt {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kPanelRows = 6;
constexpr int kAttentionRows = 3;
constexpr int kAttentionColumns = 2;
constexpr int kActivationOffset = 0;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

template <int kBits>
inline Floats to_float(Words word, int j) {
  return __builtin_convertvector(reinterpret_cast<Ints>(word << (32 - kBits * (j + 1))) >> (32 - kBits), Floats);
}

constexpr int kBlockRows = 4, kTilesTogether = 1;

inline Floats half_to_float(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Pairs of products fit 16 bits where codes have at most 7; 8-bit codes are widened first.
template <int kBits>
inline Ints dot_unsigned(Ints sum, Words w, uint32_t x) {
  const __m256i words = reinterpret_cast<__m256i>(w), four = _mm256_set1_epi32(static_cast<int>(x));
  if constexpr (kBits < 8) {
    return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_maddubs_epi16(words, four), _mm256_set1_epi16(1)));
  } else {
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(words, 8), _mm256_srai_epi16(four, 8));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xFF)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
    return sum + reinterpret_cast<Ints>(odd) + reinterpret_cast<Ints>(even);
  }
}

struct PairSums {
  static constexpr bool kUseful = true;
  __m256i sums;
  void add(Words w, uint32_t x) {
    sums = _mm256_add_epi16(
        sums, _mm256_maddubs_epi16(reinterpret_cast<__m256i>(w), _mm256_set1_epi32(static_cast<int>(x))));
    asm("" : "+x"(sums));  // the compiler would reorder the additions and run out of registers
  }
  Ints total() const { return reinterpret_cast<Ints>(_mm256_madd_epi16(sums, _mm256_set1_epi16(1))); }
};

// Widened to 16 bits, because the instruction that multiplies bytes saturates its sums.
inline Ints dot(Ints sum, uint32_t x, Words w) {
  const __m256i words = reinterpret_cast<__m256i>(w), four = _mm256_set1_epi32(static_cast<int>(x));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(words, 8), _mm256_srai_epi16(four, 8));
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8),
                                         _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
  return sum + reinterpret_cast<Ints>(odd) + reinterpret_cast<Ints>(even);
}

// Consecutive numbers in 32 bits. (GCC 12 takes __builtin_convertvector of them apart, number by number.)
inline Ints widened(const int8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline Ints widened(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline Ints widened(const uint16_t* from) {
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// The lowest bits of each word.
inline void store_bytes(void* to, Words words) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i low = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(words), order);
  _mm_storel_epi64(static_cast<__m128i*>(to),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

inline void store_halves(void* to, Words words) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i low = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(words), order);
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm_unpacklo_epi64(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

// Consecutive 8-bit numbers as 16-bit ones, two in a word.
inline Words widen_int8(const void* from) {
  return reinterpret_cast<Words>(_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

inline Words widen_uint8(const void* from) {
  return reinterpret_cast<Words>(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

// The entries of a table of eight that the halves of each word name; of higher numbers the result means nothing.
inline Words look_up(const uint16_t* table, Words indices) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  const Words bytes = (indices << 1 | indices << 9) + 0x01000100;  // both bytes of each entry
  return reinterpret_cast<Words>(_mm256_shuffle_epi8(entries, reinterpret_cast<__m256i>(bytes)));
}

inline Words look_up_bytes(const uint8_t* table, Words indices) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return reinterpret_cast<Words>(_mm256_shuffle_epi8(entries, reinterpret_cast<__m256i>(indices)));
}

inline Ints dot_int16(Ints sum, Words a, Words b) {
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

}  // namespace
}  // namespace llmopt

#include "bfloat16.h"

#include "kernels_impl.h"

namespace llmopt {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2", [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  });
  return &kernels;
}

}  // namespace llmopt
#else
const llmopt::Kernels* llmopt::avx2_kernels() { return nullptr; }
#endif
