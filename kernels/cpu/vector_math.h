// Functions of vectors, for the files of an instruction set: included after its vector types are defined.
#include <cstring>

namespace llmopt {
namespace {

constexpr int kLanes = kVectorBytes / 4;
constexpr int kParts = kTile / kLanes;  // vectors across a tile

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats broadcast(float value) { return Floats{} + value; }

// Stores the first `count` lanes.
inline void store(float* to, Floats value, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &value, sizeof value);
  } else if (count > 0) {
    std::memcpy(to, &value, static_cast<size_t>(count) * sizeof(float));
  }
}

// The first `count` lanes, the others 0.
inline Floats load_some(const float* from, int64_t count) {
  Floats value{};
  if (count >= kLanes) {
    std::memcpy(&value, from, sizeof value);
  } else if (count > 0) {
    std::memcpy(&value, from, static_cast<size_t>(count) * sizeof(float));
  }
  return value;
}

inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// Which lanes stand `kDistance` away, as numbers in memory: the compiler would set lane by lane what is computed.
template <int kDistance>
struct Swap {
  int32_t order[kLanes];
  constexpr Swap() : order{} {
    for (int lane = 0; lane < kLanes; ++lane) order[lane] = lane ^ kDistance;
  }
};
template <int kDistance>
constexpr Swap<kDistance> kSwap{};

template <int kDistance = kLanes / 2, class Vector>
inline Vector added_up(Vector value) {
  if constexpr (kDistance == 0)
    return value;
  else
    return added_up<kDistance / 2>(value + __builtin_shuffle(value, load<Ints>(kSwap<kDistance>.order)));
}

// In an order of additions of its own, the same for every caller.
template <class Vector>
inline auto sum_of(Vector value) {
  return added_up(value)[0];
}

template <int kDistance = kLanes / 2>
inline int32_t largest_lane(Ints value) {
  if constexpr (kDistance == 0)
    return value[0];
  else
    return largest_lane<kDistance / 2>(larger(value, __builtin_shuffle(value, load<Ints>(kSwap<kDistance>.order))));
}

// Of `count` numbers. The bits of magnitudes order as the magnitudes do, with NaN above all: it is the largest.
inline float largest_magnitude(const float* x, int64_t count) {
  Ints most{};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) most = larger(most, load<Ints>(x + i) & 0x7FFFFFFF);
  if (whole < count) most = larger(most, reinterpret_cast<Ints>(load_some(x + whole, count - whole)) & 0x7FFFFFFF);
  const int32_t bits = largest_lane(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// The nearest whole number, halves to even, of magnitudes below 2^22: adding this constant leaves no place for
// fractions.
constexpr float kRounder = 12582912.0F;

// e^x to 2 units in the last place; 0 below -87.3, and what is above 88 counts as 88. (Cody and Waite's reduction by
// ln 2 in two parts, then Taylor's series to the seventh power on |r| <= ln 2 / 2.) NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats low = broadcast(-87.3F), high = broadcast(88.0F);
  const Ints under = x < low;
  Floats held = x > high ? high : x;
  held = under ? low : held;
  const Floats shifted = held * 1.44269504F + kRounder;
  const Floats whole = shifted - kRounder;
  const Floats r = (held - whole * 0.693359375F) + whole * 2.12194440e-4F;
  Floats series = broadcast(1.0F / 5040);
  series = series * r + 1.0F / 720;
  series = series * r + 1.0F / 120;
  series = series * r + 1.0F / 24;
  series = series * r + 1.0F / 6;
  series = series * r + 0.5F;
  series = series * r * r + (r + 1.0F);
  const Ints power = (reinterpret_cast<Ints>(shifted) - 0x4B400000 + 127) << 23;
  const Floats value = series * reinterpret_cast<Floats>(power);
  return under ? Floats{} : value;
}

}  // namespace
}  // namespace llmopt
