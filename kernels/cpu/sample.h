// Chooses one token for every row of logits.
#pragma once

#include "kernels.h"
#include "pool.h"

namespace llmopt {

// How rows are drawn, an element a row.
struct Draws {
  const float* temperature;  // 0 takes the largest logit
  const int64_t* top_k;      // 0 for all tokens
  const float* top_p;        // 1 for all
  const float* min_p;        // 0 for all
  const double* uniform;     // 0 <= uniform < 1
};

// Tokens of each row.
struct TokenLists {
  const int64_t* starts;  // [rows + 1]: row r's tokens are starts[r] .. starts[r + 1] - 1
  const int32_t* tokens;
};

// What is added to logits of some tokens, each of them once.
struct Bias {
  TokenLists lists;
  const float* values;
};

// What earlier tokens cost; the settings have an element a row.
struct Penalties {
  const float* repetition;
  const float* frequency;
  const float* presence;
  TokenLists lists;       // the tokens of prompt and output, each once
  const int32_t* counts;  // how often the output has them
};

// What is not wanted has null pointers; without draws all rows take their largest logit.
struct SamplingBatch {
  float* logits;  // [rows][vocabulary], overwritten
  int64_t rows, vocabulary;
  Draws draws;
  Bias bias;
  Penalties penalties;
  TokenLists forbidden;  // must not be chosen
  TokenLists allowed;    // nothing else may be chosen; a row without any may have all
};

// Writes rows tokens, spreading rows (or, where there is but one, spans of it) over the threads of the pool. What is
// chosen is defined by llmopt/backend/reference_sampling.py. A row's token depends on nothing of the other rows.
void sample(ThreadPool& pool, const Kernels& kernels, const SamplingBatch& batch, int64_t* tokens);

}  // namespace llmopt
