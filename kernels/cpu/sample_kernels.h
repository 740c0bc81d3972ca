// What sampling needs of an instruction set: what is done to every logit of a row. Included by kernels.h.
#pragma once

#include <cstdint>

namespace llmopt {

// The largest of a row's logits and where it stands.
struct Largest {
  float value;
  int64_t index;
};

// Tokens are put into buckets by their distance from the likeliest: the difference of the logits, over the temperature.
// A bucket is a run of floats that share exponent and first six bits, so that buckets are narrow where tokens are
// likely, at every temperature. What is nearer than 2^-10 shares the first, what is further than kFurthest the last.
constexpr float kFurthest = 87.0F;  // e^-87 is still a normal number; what is further has no weight
constexpr int32_t kFurthestBits = 0x42AE0000, kNearestBits = 0x3A800000;
constexpr int kBucketShift = 17;
constexpr int kBuckets = ((kFurthestBits - kNearestBits) >> kBucketShift) + 1;

// A mass is a sum of weights, each cut to a whole number of units of 2^-42. Such sums are exact: they do not depend on
// the order of additions, and a mass found by one way is found again by another. A token 2^42 times less likely than
// the likeliest has none.
using Mass = uint64_t;
constexpr int kMassBits = 42;
constexpr int64_t kRun = 256;  // tokens, in the order of ids, whose mass is summed at once

struct SampleKernels {
  // The largest of count > 0 logits, of equals the first; the first NaN where there is one.
  Largest (*largest)(const float* x, int64_t count);
  // For logits without NaN whose largest, over the temperature, is the finite `top`: each token's weight, e^-distance,
  // and the number of its bucket. Whole vectors are written: up to 15 elements more than `count`, of weight 0.
  void (*weigh)(const float* x, int64_t count, float temperature, float top, float* weights, uint16_t* buckets);
  // The mass of each run of kRun weights, the last of which may be shorter, as `weigh` has left them.
  void (*sum_runs)(const float* weights, int64_t count, Mass* runs);
};

}  // namespace llmopt
