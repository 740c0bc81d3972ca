// The tokens of a row in the order of their likelihood, and the mass of the first so many of them, without sorting.
#pragma once

#include <cstdint>
#include <vector>

#include "sample_kernels.h"

namespace llmopt {

inline Mass mass_of(float weight) {
  return static_cast<Mass>(static_cast<int64_t>(weight * static_cast<float>(int64_t{1} << kMassBits)));
}

// A row as SampleKernels::weigh leaves it; logits over the temperature are at most `top`.
struct WeighedRow {
  const float* logits;
  const float* weights;
  const uint16_t* buckets;
  int64_t count;
  float temperature, top;
};

// The top_k likeliest tokens of a row (0 for all); of equally likely ones that with the smaller id comes first. The
// mass of each bucket is summed in one pass over the row; after that only the buckets that a question falls into are
// sorted.
class RankedMass {
 public:
  RankedMass(const WeighedRow& row, int64_t top_k);

  Mass total() const { return total_; }
  // The mass of the tokens that are at least `share` times as likely as the likeliest, 0 < share <= 1.
  Mass of_share(float share);
  // The mass of the fewest likeliest tokens that have at least this mass, 1 to total().
  Mass reaching(Mass mass) { return find(mass).mass; }
  // The token with which the sum over likelier tokens and itself reaches this mass, 1 to total().
  int64_t token_at(Mass mass) { return find(mass).token; }

 private:
  struct Member {
    float logit;  // over the temperature
    int32_t token;
    Mass mass;
  };
  struct Place {
    int64_t token;
    Mass mass;  // of this token and all likelier ones
  };

  void keep_first(int64_t top_k);
  Place find(Mass mass);
  const std::vector<Member>& sorted(int bucket);

  WeighedRow row_;
  std::vector<Mass> masses_;  // of each bucket
  Mass total_;
  int cut_ = kBuckets;  // the bucket that top-k cuts through; kBuckets where there is none
  int64_t kept_ = 0;    // how many of its tokens stay
  int sorted_ = -1;     // the bucket that was sorted last
  std::vector<Member> members_;  // its tokens
};

}  // namespace llmopt
