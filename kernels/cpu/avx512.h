// AVX-512 (F, BW, VL, DQ): vectors of 512 bits; with VNNI where the including file is compiled for it.
#include <immintrin.h>

#include "kernels.h"

namespace llmopt {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kPanelRows = 12;
constexpr int kAttentionRows = 6;

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

constexpr int kBlockRows = 6, kTilesTogether = 2;

inline Floats half_to_float(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Consecutive numbers in 32 bits. (GCC 12 takes __builtin_convertvector of them apart, number by number.)
inline Ints widened(const int8_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline Ints widened(const uint8_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline Ints widened(const uint16_t* from) {
  return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

// The lowest bits of each word.
inline void store_bytes(void* to, Words words) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(words)));
}

inline void store_halves(void* to, Words words) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
}

// Consecutive 8-bit numbers as 16-bit ones, two in a word.
inline Words widen_int8(const void* from) {
  return reinterpret_cast<Words>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
}

inline Words widen_uint8(const void* from) {
  return reinterpret_cast<Words>(_mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
}

// The entries of a table of eight that the halves of each word name; of higher numbers the result means nothing.
inline Words look_up(const uint16_t* table, Words indices) {
  const __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return reinterpret_cast<Words>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(indices), entries));
}

inline Words look_up_bytes(const uint8_t* table, Words indices) {
  const __m512i entries = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return reinterpret_cast<Words>(_mm512_shuffle_epi8(entries, reinterpret_cast<__m512i>(indices)));
}

#if defined(__AVX512VNNI__)

inline Ints dot_int16(Ints sum, Words a, Words b) {
  return reinterpret_cast<Ints>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

template <int kBits>
inline Ints dot_unsigned(Ints sum, Words w, uint32_t x) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                                                    _mm512_set1_epi32(static_cast<int>(x))));
}

struct PairSums {
  static constexpr bool kUseful = false;  // four products are added up in 32 bits at once
};

constexpr int kActivationOffset = 128;  // vpdpbusd takes one operand unsigned

inline Ints dot(Ints sum, uint32_t x, Words w) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(static_cast<int>(x)), reinterpret_cast<__m512i>(w)));
}

#else

inline Ints dot_int16(Ints sum, Words a, Words b) {
  return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

// Pairs of products fit 16 bits where codes have at most 7; 8-bit codes are widened first.
template <int kBits>
inline Ints dot_unsigned(Ints sum, Words w, uint32_t x) {
  const __m512i words = reinterpret_cast<__m512i>(w), four = _mm512_set1_epi32(static_cast<int>(x));
  if constexpr (kBits < 8) {
    return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(_mm512_maddubs_epi16(words, four), _mm512_set1_epi16(1)));
  } else {
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(words, 8), _mm512_srai_epi16(four, 8));
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0xFF)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8));
    return sum + reinterpret_cast<Ints>(odd) + reinterpret_cast<Ints>(even);
  }
}

struct PairSums {
  static constexpr bool kUseful = true;
  __m512i sums;
  void add(Words w, uint32_t x) {
    sums = _mm512_add_epi16(
        sums, _mm512_maddubs_epi16(reinterpret_cast<__m512i>(w), _mm512_set1_epi32(static_cast<int>(x))));
    asm("" : "+v"(sums));  // the compiler would reorder the additions and run out of registers
  }
  Ints total() const { return reinterpret_cast<Ints>(_mm512_madd_epi16(sums, _mm512_set1_epi16(1))); }
};

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

#if defined(__AVX512BF16__)

constexpr bool kNativeBfloat16 = true;
constexpr int kAttentionColumns = 4;

inline Floats dot_bfloat16(Floats sum, Words a, Words b) {
  return reinterpret_cast<Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

inline void store_bfloat16(void* to, Floats value) {
  const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
  __builtin_memcpy(to, &halves, sizeof halves);
}

#else

constexpr int kAttentionColumns = 2;  // a pair of bfloat16 takes two registers here

#endif

}  // namespace
}  // namespace llmopt

#if !defined(__AVX512BF16__)
#include "bfloat16.h"
#endif
#include "kernels_impl.h"
