// The Python face of sample.h.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "module.h"
#include "multiplier.h"
#include "sample.h"

namespace llmopt {
namespace {

// The parts of a SamplingBatch as llmopt.backend.sampling has them.
using DrawArrays = std::tuple<Array<float, 1>, Array<int64_t, 1>, Array<float, 1>, Array<float, 1>, Array<double, 1>>;
using PenaltyArrays = std::tuple<Array<float, 1>, Array<float, 1>, Array<float, 1>, Array<int64_t, 1>,
                                 Array<int32_t, 1>, Array<int32_t, 1>>;
using BiasArrays = std::tuple<Array<int64_t, 1>, Array<int32_t, 1>, Array<float, 1>>;
using TokenArrays = std::tuple<Array<int64_t, 1>, Array<int32_t, 1>>;

Draws view_of(const DrawArrays& arrays, int64_t rows) {
  const auto& [temperature, top_k, top_p, min_p, uniform] = arrays;
  for (const size_t size : {temperature.size(), top_k.size(), top_p.size(), min_p.size(), uniform.size()}) {
    check(static_cast<int64_t>(size) == rows, "draws must have an element a row");
  }
  return {temperature.data(), top_k.data(), top_p.data(), min_p.data(), uniform.data()};
}

// Starts must cut the tokens, all of them in the vocabulary, into rows.
TokenLists lists_of(const Array<int64_t, 1>& starts, const Array<int32_t, 1>& tokens, int64_t rows, int64_t vocabulary) {
  check(static_cast<int64_t>(starts.size()) == rows + 1 && starts(0) == 0 &&
            starts(starts.size() - 1) == static_cast<int64_t>(tokens.size()) &&
            std::is_sorted(starts.data(), starts.data() + starts.size()),
        "starts must go up from 0 to the number of tokens, in rows + 1 steps");
  check(std::all_of(tokens.data(), tokens.data() + tokens.size(),
                    [&](int32_t token) { return token >= 0 && token < vocabulary; }),
        "a token is outside the vocabulary");
  return {starts.data(), tokens.data()};
}

Bias view_of(const BiasArrays& arrays, int64_t rows, int64_t vocabulary) {
  const auto& [starts, tokens, values] = arrays;
  check(values.size() == tokens.size(), "every token must have a bias");
  return {lists_of(starts, tokens, rows, vocabulary), values.data()};
}

Penalties view_of(const PenaltyArrays& arrays, int64_t rows, int64_t vocabulary) {
  const auto& [repetition, frequency, presence, starts, tokens, counts] = arrays;
  for (const size_t size : {repetition.size(), frequency.size(), presence.size()}) {
    check(static_cast<int64_t>(size) == rows, "penalties must have an element a row");
  }
  check(counts.size() == tokens.size(), "every token must have a count");
  return {repetition.data(), frequency.data(), presence.data(), lists_of(starts, tokens, rows, vocabulary),
          counts.data()};
}

TokenLists view_of(const TokenArrays& arrays, int64_t rows, int64_t vocabulary) {
  const auto& [starts, tokens] = arrays;
  return lists_of(starts, tokens, rows, vocabulary);
}

// Addresses of float32 logits [rows, vocabulary], which are overwritten, and of int64 tokens [rows].
void sample_rows(Multiplier& multiplier, uintptr_t logits, int64_t rows, int64_t vocabulary, uintptr_t tokens,
                 const std::optional<DrawArrays>& draws, const std::optional<BiasArrays>& bias,
                 const std::optional<PenaltyArrays>& penalties, const std::optional<TokenArrays>& forbidden,
                 const std::optional<TokenArrays>& allowed) {
  check(vocabulary > 0, "the vocabulary must not be empty");
  SamplingBatch batch{reinterpret_cast<float*>(logits), rows, vocabulary, {}, {}, {}, {}, {}};
  if (draws) batch.draws = view_of(*draws, rows);
  if (bias) batch.bias = view_of(*bias, rows, vocabulary);
  if (penalties) batch.penalties = view_of(*penalties, rows, vocabulary);
  if (forbidden) batch.forbidden = view_of(*forbidden, rows, vocabulary);
  if (allowed) batch.allowed = view_of(*allowed, rows, vocabulary);
  nb::gil_scoped_release unlocked;
  llmopt::sample(multiplier.pool(), multiplier.kernels(), batch, reinterpret_cast<int64_t*>(tokens));
}

}  // namespace

void bind_sampling(nb::class_<Multiplier>& multiplier) {
  multiplier.def(
      "sample", &sample_rows, nb::arg("logits"), nb::arg("rows"), nb::arg("vocabulary"), nb::arg("tokens"),
      nb::arg("draws").none(), nb::arg("bias").none(), nb::arg("penalties").none(), nb::arg("forbidden").none(),
      nb::arg("allowed").none(),
      "Choose a token for each row of float32 logits, which are overwritten; logits and int64 tokens by address.");
}

}  // namespace llmopt
