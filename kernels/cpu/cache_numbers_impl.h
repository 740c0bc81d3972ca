// The numbers of a paged cache: rounding to them, expanding them, and the pairs of 16 bits that are multiplied. Included
// as kernels_impl.h is.
//
// A cache of bfloat16 or fp8 meets queries and weights of bfloat16, its sums are float32. A cache of int8 meets queries
// and weights of 16-bit integers, each row of them with a scale of its own, and its sums are exact.

namespace llmopt {
namespace {

// How a vector of pairs is read and multiplied. The lower half of a word is its first number.
struct Bfloat16Pairs {
  typedef Floats Sum;
  static constexpr int64_t kBytes = 4;  // of a pair where it is read
  static Words read(const char* at) { return load<Words>(at); }
  static Sum dot(Sum sum, Words a, Words b) { return dot_bfloat16(sum, a, b); }
  static Floats floats(Sum sum) { return sum; }
};

struct Int8Pairs {
  typedef Ints Sum;  // of at most 256 products of 16 by 8 bits
  static constexpr int64_t kBytes = 2;
  static Words read(const char* at) { return widen_int8(at); }
  static Sum dot(Sum sum, Words a, Words b) { return dot_int16(sum, a, b); }
  static Floats floats(Sum sum) { return __builtin_convertvector(sum, Floats); }
};

inline Ints lane_numbers() {
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

template <class Vector>
inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

// The largest of a vector's lanes, by halving it.
template <class Element, int kCount, class Vector>
inline Element largest_of(Vector value) {
  if constexpr (kCount == 4) {
    return larger(larger(value[0], value[1]), larger(value[2], value[3]));
  } else {
    typedef Element Half __attribute__((vector_size(sizeof(Element) * kCount / 2)));
    Half parts[2];
    std::memcpy(parts, &value, sizeof parts);
    return largest_of<Element, kCount / 2>(larger(parts[0], parts[1]));
  }
}

inline Words magnitude_bits(Floats value) { return reinterpret_cast<Words>(value) & 0x7fffffff; }

// The nearest integers, halves to even: so large a number has no fraction left, and its lowest bits are the integer.
inline Words rounded_bits(Floats value) { return reinterpret_cast<Words>(value + 0x1.8p23F); }

inline void encode_bfloat16(const float* x, int64_t count, void* codes) {
  for (int64_t i = 0; i < count; i += kLanes) store_bfloat16(static_cast<uint16_t*>(codes) + i, load<Floats>(x + i));
}

// Rounds to signed codes and returns the scale: the largest magnitude / 127.
inline float encode_int8(const float* x, int64_t count, uint8_t* codes) {
  const float largest = largest_magnitude(x, count), scale = largest == 0 ? 1.0F : largest / 127.0F;
  for (int64_t i = 0; i < count; i += kLanes) store_bytes(codes + i, rounded_bits(load<Floats>(x + i) / scale));
  return scale;
}

// The same to 16 bits, where the scale is the largest magnitude / 32767. The codes may overwrite x.
inline float encode_int16(const float* x, int64_t count, void* codes) {
  const float largest = largest_magnitude(x, count), inverse = largest == 0 ? 0.0F : 32767.0F / largest;
  for (int64_t i = 0; i < count; i += kLanes) {
    store_halves(static_cast<uint16_t*>(codes) + i, rounded_bits(load<Floats>(x + i) * inverse));
  }
  return largest / 32767.0F;
}

// Rounds to e4m3, halves to even, the largest number (448) for all that are larger. The scale is always 1.
inline float encode_fp8(const float* x, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats value = load<Floats>(x + i), magnitude = reinterpret_cast<Floats>(magnitude_bits(value));
    const Words bits = reinterpret_cast<Words>(magnitude < 448.0F ? magnitude : broadcast(448.0F));
    // float32's exponent is 120 more, and its mantissa has 20 bits more.
    const Words normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    // Below 2^-6 the step is 2^-9, which is the step of float32 beside 2^14.
    const Words tiny = reinterpret_cast<Words>(magnitude + 0x1p14F) & 0xf;
    Words code = magnitude < 0x1p-6F ? tiny : normal;
    code = value == value ? code : Words{} + 0x7f;
    store_bytes(codes + i, code | (reinterpret_cast<Words>(value) >> 24 & 0x80));
  }
  return 1.0F;
}

// Expands `count` pairs of fp8, a multiple of 16, to bfloat16.
inline void expand_fp8(const char* codes, int64_t count, char* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Numbers magnitude = reinterpret_cast<Numbers>(widen_uint8(codes + 2 * i)) & 0x7f;
    const Numbers value = magnitude == 0x7f ? Numbers{} + 0x7fc0 : fp8_pairs(codes + 2 * i);  // NaN has a code
    std::memcpy(to + 4 * i, &value, sizeof value);
  }
}

}  // namespace
}  // namespace llmopt
