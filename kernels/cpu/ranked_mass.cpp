#include "ranked_mass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace llmopt {
namespace {

constexpr int64_t kBlock = 64;

// Calls body(token) for the tokens whose bucket is in(bucket), by id. Blocks are tested as a whole first, without
// branches, so that the compiler makes vectors of the tests (of 16-bit numbers, if `in` compares with one): the buckets
// asked for hold few tokens.
template <class In, class Body>
void each_token(const WeighedRow& row, In&& in, Body&& body) {
  for (int64_t first = 0; first < row.count; first += kBlock) {
    const uint16_t* own = row.buckets + first;
    const int64_t count = std::min(kBlock, row.count - first);
    if (count == kBlock) {
      uint16_t found = 0;
      for (int64_t i = 0; i < kBlock; ++i) found |= in(own[i]);
      if (!found) continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      if (in(own[i])) body(first + i);
    }
  }
}

int bucket_at(float distance) {
  const float within = std::min(distance, kFurthest);
  int32_t bits;
  std::memcpy(&bits, &within, sizeof bits);
  return std::max(bits - kNearestBits, 0) >> kBucketShift;
}

}  // namespace

RankedMass::RankedMass(const WeighedRow& row, int64_t top_k) : row_(row), masses_(kBuckets) {
  if (top_k > 0 && top_k < row.count) {
    keep_first(top_k);
  } else {
    for (int64_t i = 0; i < row.count; ++i) masses_[row.buckets[i]] += mass_of(row.weights[i]);
  }
  total_ = std::accumulate(masses_.begin(), masses_.end(), Mass{0});
}

void RankedMass::keep_first(int64_t top_k) {
  std::vector<int32_t> tokens(kBuckets);
  for (int64_t i = 0; i < row_.count; ++i) ++tokens[row_.buckets[i]];
  cut_ = 0;
  while (tokens[cut_] < top_k) top_k -= tokens[cut_++];
  kept_ = top_k;
  each_token(
      row_, [end = static_cast<uint16_t>(cut_)](uint16_t bucket) { return bucket < end; },
      [&](int64_t token) { masses_[row_.buckets[token]] += mass_of(row_.weights[token]); });
  for (const Member& member : sorted(cut_)) masses_[cut_] += member.mass;
}

Mass RankedMass::of_share(float share) {
  const int bucket = bucket_at(static_cast<float>(std::log(1.0 / share)));
  if (bucket > cut_) return total_;
  Mass sum = std::accumulate(masses_.begin(), masses_.begin() + bucket, Mass{0});
  for (const Member& member : sorted(bucket)) {
    if (std::exp(static_cast<double>(member.logit - row_.top)) >= share) sum += member.mass;
  }
  return sum;
}

RankedMass::Place RankedMass::find(Mass mass) {
  Mass sum = 0;
  int bucket = 0;
  while (sum + masses_[bucket] < mass) sum += masses_[bucket++];
  const Member* member = sorted(bucket).data();
  for (sum += member->mass; sum < mass; sum += member->mass) ++member;
  return {member->token, sum};
}

const std::vector<RankedMass::Member>& RankedMass::sorted(int bucket) {
  if (bucket == sorted_) return members_;
  members_.clear();
  each_token(
      row_, [wanted = static_cast<uint16_t>(bucket)](uint16_t other) { return other == wanted; },
      [&](int64_t token) {
        members_.push_back(
            {row_.logits[token] / row_.temperature, static_cast<int32_t>(token), mass_of(row_.weights[token])});
      });
  std::sort(members_.begin(), members_.end(), [](const Member& a, const Member& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
  });
  if (bucket == cut_) members_.resize(static_cast<size_t>(kept_));
  sorted_ = bucket;
  return members_;
}

}  // namespace llmopt
