// Any processor: vectors of 128 bits, which the compiler maps to what every x86-64 and aarch64 has.
#include "kernels.h"

namespace llmopt {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kPanelRows = 6;
constexpr int kActivationOffset = 0;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

template <int kBits>
inline Floats to_float(Words word, int j) {
  return __builtin_convertvector(reinterpret_cast<Ints>(word << (32 - kBits * (j + 1))) >> (32 - kBits), Floats);
}

inline Ints dot(Ints sum, uint32_t x, Words w) {
  for (int j = 0; j < 4; ++j) {
    sum += (reinterpret_cast<Ints>(w << (24 - 8 * j)) >> 24) * static_cast<int8_t>(x >> (8 * j));
  }
  return sum;
}

}  // namespace
}  // namespace llmopt

#include "kernels_impl.h"

namespace llmopt {

const Kernels* plain_kernels() {
  static constexpr Kernels kernels = make_kernels("plain", [] { return true; });
  return &kernels;
}

}  // namespace llmopt
