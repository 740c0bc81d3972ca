// Pairs of bfloat16 on a processor that has no instructions for them: a bfloat16 is the upper half of a float32. The
// lower half of a word is the pair's first number. Included, like kernels_impl.h, where the vector types are defined.

namespace llmopt {
namespace {

constexpr bool kNativeBfloat16 = false;

// sum + the products of both numbers, lane by lane.
inline Floats dot_bfloat16(Floats sum, Words a, Words b) {
  sum += reinterpret_cast<Floats>(a << 16) * reinterpret_cast<Floats>(b << 16);
  sum += reinterpret_cast<Floats>(a & 0xffff0000) * reinterpret_cast<Floats>(b & 0xffff0000);
  return sum;
}

// Rounds to nearest, halves to even; NaN stays NaN, whatever its bits.
inline void store_bfloat16(void* to, Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words number = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = Words{} + 0x7fc0;
  const Words rounded = value == value ? number : nan;
  store_halves(to, rounded);
}

}  // namespace
}  // namespace llmopt
