// Any processor: vectors of 128 bits, which the compiler maps to what every x86-64 and aarch64 has.
#include "kernels.h"

namespace llmopt {
namespace {

constexpr int kVectorBytes = 16;
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

constexpr int kBlockRows = 2, kTilesTogether = 1;

// By the bits: magnitude and sign of the 16 bits, moved to their places in 32, are the value times 2^-112.
inline Floats half_to_float(const uint16_t* from) {
  Words bits;
  for (int lane = 0; lane < kVectorBytes / 4; ++lane) bits[lane] = from[lane];
  const Words magnitude = (bits & 0x7FFFU) << 13, sign = (bits & 0x8000U) << 16;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) * 0x1p112F) | sign);
}

template <int kBits>
inline Ints dot_unsigned(Ints sum, Words w, uint32_t x) {
  for (int j = 0; j < 4; ++j) {
    sum += reinterpret_cast<Ints>((w >> (8 * j)) & 0xFFU) * static_cast<int8_t>(x >> (8 * j));
  }
  return sum;
}

struct PairSums {
  static constexpr bool kUseful = false;
};

inline Ints dot(Ints sum, uint32_t x, Words w) {
  for (int j = 0; j < 4; ++j) {
    sum += (reinterpret_cast<Ints>(w << (24 - 8 * j)) >> 24) * static_cast<int8_t>(x >> (8 * j));
  }
  return sum;
}

// Consecutive numbers in 32 bits.
template <class Narrow>
inline Ints widened(const Narrow* from) {
  Ints wide;
  for (int lane = 0; lane < kVectorBytes / 4; ++lane) wide[lane] = from[lane];
  return wide;
}

// The lowest bits of each word.
template <class Narrow>
inline void store_narrow(void* to, Words words) {
  Narrow narrow[kVectorBytes / 4];
  for (int lane = 0; lane < kVectorBytes / 4; ++lane) narrow[lane] = static_cast<Narrow>(words[lane]);
  __builtin_memcpy(to, narrow, sizeof narrow);
}

inline void store_bytes(void* to, Words words) { store_narrow<uint8_t>(to, words); }
inline void store_halves(void* to, Words words) { store_narrow<uint16_t>(to, words); }

// Consecutive 8-bit numbers as 16-bit ones, two in a word.
inline Words widen_int8(const void* from) {
  int8_t narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return reinterpret_cast<Words>(__builtin_convertvector(narrow, Shorts));
}

inline Words widen_uint8(const void* from) {
  uint8_t narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes)));
  __builtin_memcpy(&narrow, from, sizeof narrow);
  return reinterpret_cast<Words>(__builtin_convertvector(narrow, Shorts));
}

// The entries of a table of eight that the halves of each word name; of higher numbers the result means nothing.
inline Words look_up(const uint16_t* table, Words indices) {
  Words entries;
  for (int lane = 0; lane < kVectorBytes / 4; ++lane) {
    entries[lane] = table[indices[lane] & 7] | static_cast<uint32_t>(table[indices[lane] >> 16 & 7]) << 16;
  }
  return entries;
}

inline Words look_up_bytes(const uint8_t* table, Words indices) {
  uint8_t bytes[kVectorBytes];
  __builtin_memcpy(bytes, &indices, sizeof bytes);
  for (uint8_t& byte : bytes) byte = table[byte & 15];
  __builtin_memcpy(&indices, bytes, sizeof bytes);
  return indices;
}

inline Ints dot_int16(Ints sum, Words a, Words b) {
  sum += (reinterpret_cast<Ints>(a << 16) >> 16) * (reinterpret_cast<Ints>(b << 16) >> 16);
  sum += (reinterpret_cast<Ints>(a) >> 16) * (reinterpret_cast<Ints>(b) >> 16);
  return sum;
}

}  // namespace
}  // namespace llmopt

#include "bfloat16.h"

#include "kernels_impl.h"

namespace llmopt {

const Kernels* plain_kernels() {
  static constexpr Kernels kernels = make_kernels("plain", [] { return true; });
  return &kernels;
}

}  // namespace llmopt
