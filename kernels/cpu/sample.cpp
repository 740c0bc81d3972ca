#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "ranked_mass.h"

namespace llmopt {
namespace {

constexpr int64_t kSpan = 16384;  // logits of a row that is shared among threads
constexpr int64_t kPadding = 16;  // what the kernels may write past the end of a row

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Calls each(i, logit) for the places i of a row's tokens in the lists; for none where the lists are not wanted.
template <typename Each>
void for_tokens(const TokenLists& lists, int64_t row, float* logits, const Each& each) {
  if (!lists.starts) return;
  for (int64_t i = lists.starts[row]; i < lists.starts[row + 1]; ++i) each(i, logits[lists.tokens[i]]);
}

void penalise(const Penalties& penalties, int64_t row, float* logits) {
  for_tokens(penalties.lists, row, logits, [&](int64_t i, float& logit) {
    const float repetition = penalties.repetition[row];
    logit = logit > 0 ? logit / repetition : logit * repetition;
    if (penalties.counts[i] == 0) return;
    const float often = penalties.frequency[row] * static_cast<float>(penalties.counts[i]);
    logit -= often + penalties.presence[row];
  });
}

void keep_only(const TokenLists& allowed, int64_t row, float* logits, int64_t vocabulary) {
  std::vector<float> kept;
  for_tokens(allowed, row, logits, [&](int64_t, float logit) { kept.push_back(logit); });
  if (kept.empty()) return;
  std::fill_n(logits, vocabulary, kNever);
  const float* next = kept.data();
  for_tokens(allowed, row, logits, [&](int64_t, float& logit) { logit = *next++; });
}

// What the reference's `adjust` does, with the same roundings, one by one.
void adjust(const SamplingBatch& batch, int64_t row, float* logits) {
  for_tokens(batch.bias.lists, row, logits, [&](int64_t i, float& logit) { logit += batch.bias.values[i]; });
  penalise(batch.penalties, row, logits);
  for_tokens(batch.forbidden, row, logits, [](int64_t, float& logit) { logit = kNever; });
  keep_only(batch.allowed, row, logits, batch.vocabulary);
}

Largest largest_by_spans(ThreadPool& pool, const Kernels& kernels, const float* logits, int64_t count) {
  std::vector<Largest> found(static_cast<size_t>((count + kSpan - 1) / kSpan));
  pool.run(static_cast<int64_t>(found.size()), [&](int64_t span) {
    Largest& best = found[static_cast<size_t>(span)];
    best = kernels.sample.largest(logits + span * kSpan, std::min(kSpan, count - span * kSpan));
    best.index += span * kSpan;
  });
  Largest best = found[0];
  for (const Largest& other : found) {
    if (std::isnan(best.value)) break;
    if (other.value > best.value || std::isnan(other.value)) best = other;
  }
  return best;
}

// The mass at which a random number 0 <= uniform < 1 falls, 1 to mass.
Mass drawn(double uniform, Mass mass) {
  return std::min(mass, static_cast<Mass>(uniform * static_cast<double>(mass)) + 1);
}

// The token with which the running sum, in the order of ids, reaches the mass drawn.
int64_t draw_from_all(const Kernels& kernels, const float* weights, int64_t count, double uniform) {
  std::vector<Mass> runs(static_cast<size_t>((count + kRun - 1) / kRun));
  kernels.sample.sum_runs(weights, count, runs.data());
  const Mass target = drawn(uniform, std::accumulate(runs.begin(), runs.end(), Mass{0}));
  Mass sum = 0;
  int64_t run = 0;
  while (sum + runs[run] < target) sum += runs[run++];
  int64_t token = run * kRun;
  for (sum += mass_of(weights[token]); sum < target; sum += mass_of(weights[token])) ++token;
  return token;
}

// Each filter keeps the likeliest tokens up to some mass; top-p's is a share of what the others keep.
int64_t draw_filtered(const WeighedRow& weighed, const Draws& draws, int64_t row) {
  RankedMass ranked(weighed, draws.top_k[row]);
  Mass kept = ranked.total();
  if (draws.min_p[row] > 0) kept = std::min(kept, ranked.of_share(draws.min_p[row]));
  if (draws.top_p[row] < 1) {
    const double enough = std::ceil(static_cast<double>(draws.top_p[row]) * static_cast<double>(kept));
    kept = ranked.reaching(std::clamp<Mass>(static_cast<Mass>(enough), 1, kept));
  }
  return ranked.token_at(drawn(draws.uniform[row], kept));
}

int64_t choose(const Kernels& kernels, const SamplingBatch& batch, int64_t row) {
  float* logits = batch.logits + row * batch.vocabulary;
  adjust(batch, row, logits);
  const Draws& draws = batch.draws;
  const Largest best = kernels.sample.largest(logits, batch.vocabulary);
  const float temperature = draws.temperature ? draws.temperature[row] : 0;
  const float top = best.value / temperature;
  if (temperature == 0 || !std::isfinite(top)) return best.index;
  thread_local Buffer<float> weights;
  thread_local Buffer<uint16_t> buckets;
  if (weights.size() < batch.vocabulary + kPadding) {
    weights = Buffer<float>(batch.vocabulary + kPadding);
    buckets = Buffer<uint16_t>(batch.vocabulary + kPadding);
  }
  kernels.sample.weigh(logits, batch.vocabulary, temperature, top, weights.data(), buckets.data());
  const bool filtered = draws.top_k[row] > 0 || draws.top_p[row] < 1 || draws.min_p[row] > 0;
  if (!filtered) return draw_from_all(kernels, weights.data(), batch.vocabulary, draws.uniform[row]);
  return draw_filtered({logits, weights.data(), buckets.data(), batch.vocabulary, temperature, top}, draws, row);
}

}  // namespace

void sample(ThreadPool& pool, const Kernels& kernels, const SamplingBatch& batch, int64_t* tokens) {
  if (batch.rows == 1 && !batch.draws.temperature) {
    adjust(batch, 0, batch.logits);
    tokens[0] = largest_by_spans(pool, kernels, batch.logits, batch.vocabulary).index;
    return;
  }
  pool.run(batch.rows, [&](int64_t row) { tokens[row] = choose(kernels, batch, row); });
}

}  // namespace llmopt
