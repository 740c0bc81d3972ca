// What sampling does to every logit of a row, in the compiler's vector types; included by kernels_impl.h. Everything is
// in the anonymous namespace: see kernels.h for why.

namespace llmopt {
namespace {

// The largest of all lanes of several vectors; of equals the one that stands first in the row.
inline Largest largest_lane(const Floats* top, const Ints* block, int chains) {
  Largest best{top[0][0], block[0][0]};
  for (int chain = 0; chain < chains; ++chain) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = top[chain][lane];
      const int64_t index = block[chain][lane] + chain * kLanes + lane;
      if (value > best.value || (value == best.value && index < best.index)) best = {value, index};
    }
  }
  return best;
}

inline bool any_lane(Ints mask) {
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= mask[lane];
  return any != 0;
}

Largest largest(const float* x, int64_t count) {
  constexpr int kChains = 4;  // independent comparisons hide the latency of one
  Floats top[kChains];
  Ints block[kChains] = {}, broken{};  // where each lane's largest stands, and whether there is a NaN
  for (Floats& lanes : top) lanes = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const Floats value = load<Floats>(x + i + chain * kLanes);
      const Ints better = value > top[chain];
      top[chain] = better ? value : top[chain];
      block[chain] = better ? Ints{} + static_cast<int32_t>(i) : block[chain];
      broken |= value != value;
    }
  }
  Largest best = largest_lane(top, block, kChains);
  bool has_nan = any_lane(broken);
  for (; i < count; ++i) {
    if (x[i] > best.value) best = {x[i], i};
    has_nan |= x[i] != x[i];
  }
  if (!has_nan) return best;
  int64_t first = 0;
  while (x[first] == x[first]) ++first;
  return {x[first], first};
}

// e^-d for d from 0 to kFurthest, to 1.1 units in the last place: -d = r - n ln 2 with |r| at most ln 2 / 2, then the
// Taylor series to r^7. The first of the two parts of ln 2 has few bits, so that its multiples are exact.
inline Floats decay(Floats d) {
  const Ints n = __builtin_convertvector(d * 1.44269504F + 0.5F, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (whole * 0.693359375F - d) - whole * 2.12194440e-4F;
  Floats series = broadcast(1.0F / 5040);
  series = series * r + 1.0F / 720;
  series = series * r + 1.0F / 120;
  series = series * r + 1.0F / 24;
  series = series * r + 1.0F / 6;
  series = series * r + 0.5F;
  series = series * r * r + r + 1.0F;
  return series * reinterpret_cast<Floats>((127 - n) << 23);
}

void weigh(const float* x, int64_t count, float temperature, float top, float* weights, uint16_t* buckets) {
  const Floats furthest = broadcast(kFurthest);
  const auto weigh_lanes = [&](Floats value, int64_t i) {
    Floats distance = top - value / temperature;
    const Ints far = distance >= furthest;
    distance = far ? furthest : distance;
    const Floats weight = far ? Floats{} : decay(distance);
    Ints bits = reinterpret_cast<Ints>(distance) - kNearestBits;
    bits = bits > 0 ? bits : Ints{};
    std::memcpy(weights + i, &weight, sizeof weight);
    store_halves(buckets + i, reinterpret_cast<Words>(bits >> kBucketShift));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) weigh_lanes(load<Floats>(x + i), i);
  Floats rest = broadcast(-__builtin_inff());
  if (i < count) {
    std::memcpy(&rest, x + i, static_cast<size_t>(count - i) * sizeof(float));
    weigh_lanes(rest, i);
  }
}

// Lanes hold 32 bits, so a weight's mass is added up in two halves: whole units of 2^-21, and what they leave.
void sum_runs(const float* weights, int64_t count, Mass* runs) {
  constexpr int kHalf = kMassBits / 2;
  constexpr float kUnits = 1 << kHalf;
  for (int64_t first = 0; first < count; first += kRun) {
    Ints high{}, low{};
    for (int64_t i = first; i < count && i < first + kRun; i += kLanes) {
      const Floats weight = load<Floats>(weights + i) * kUnits;
      const Ints whole = __builtin_convertvector(weight, Ints);
      high += whole;
      low += __builtin_convertvector((weight - __builtin_convertvector(whole, Floats)) * kUnits, Ints);
    }
    Mass sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      sum += (static_cast<Mass>(high[lane]) << kHalf) + static_cast<Mass>(low[lane]);
    }
    *runs++ = sum;
  }
}

constexpr SampleKernels make_sample_kernels() { return {largest, weigh, sum_runs}; }

}  // namespace
}  // namespace llmopt
