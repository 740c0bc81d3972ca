// FP8: e4m3 numbers as bfloat16, which holds every one of them, and as floats. Included as kernels_impl.h is.

namespace llmopt {
namespace {

typedef uint16_t Numbers __attribute__((vector_size(kVectorBytes)));  // two in a word

// kLanes pairs of finite numbers as bfloat16. Seven bits moved to the place of bfloat16's exponent and mantissa lack
// 120 in the exponent; the numbers without a leading one, 0 to 7 times 2^-9, come from a table.
inline Numbers fp8_pairs(const void* from) {
  static constexpr uint16_t kTiny[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const Numbers code = reinterpret_cast<Numbers>(widen_int8(from));  // the sign in all of the upper bits
  const Numbers tiny = reinterpret_cast<Numbers>(look_up(kTiny, reinterpret_cast<Words>(code & 7)));
  return (code & 0x78) == 0 ? tiny | (code & 0x8000) : (code << 4 & 0x87f0) + 0x3c00;
}

// kLanes finite numbers over 256: float16 reads their bits so, those without a leading one included.
inline Floats fp8_parts(const uint8_t* from) {
  const Words code = reinterpret_cast<Words>(widened(from));
  uint16_t halves[kLanes];
  store_halves(halves, (code & 0x80) << 8 | (code & 0x7f) << 7);
  return half_to_float(halves);
}

// The nearest e4m3 numbers, halves to even; the largest, 448, for all beyond it. NaN stays NaN.
inline Floats nearest_fp8(Floats value) {
  const Words sign = reinterpret_cast<Words>(value) & 0x80000000;
  const Floats whole = reinterpret_cast<Floats>(reinterpret_cast<Words>(value) & 0x7fffffff), most = broadcast(448.0F);
  const Floats magnitude = whole < most ? whole : most;
  const Words bits = reinterpret_cast<Words>(magnitude);
  const Words normal = (bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000;  // three bits of the mantissa stay
  // Below 2^-6 the step is 2^-9, which is the step of float32 beside 2^14.
  const Words tiny = reinterpret_cast<Words>((magnitude + 0x1p14F) - 0x1p14F);
  const Words rounded = magnitude < 0x1p-6F ? tiny : normal;
  return value == value ? reinterpret_cast<Floats>(rounded | sign) : value;
}

}  // namespace
}  // namespace llmopt
