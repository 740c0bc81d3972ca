#include "gram.h"

#include <algorithm>

#include "buffer.h"

namespace llmopt {
namespace {

constexpr int64_t kRowsAtOnce = 4096;  // a panel of so many fits the second-level cache

// Adds the sums of panels a <= b to gram and to its mirror image.
void add_block(const float* sums, int64_t a, int64_t b, int64_t width, float* gram) {
  const int64_t top = a * kGramPanel, left = b * kGramPanel;
  const int64_t rows = std::min(kGramPanel, width - top), columns = std::min(kGramPanel, width - left);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = gram + (top + i) * width + left;
    for (int64_t j = a == b ? i : 0; j < columns; ++j) {
      row[j] += sums[i * kGramPanel + j];
      gram[(left + j) * width + top + i] = row[j];
    }
  }
}

}  // namespace

void add_gram(ThreadPool& pool, const Kernels& kernels, const float* x, int64_t rows, int64_t width, float* gram) {
  const int64_t panels = (width + kGramPanel - 1) / kGramPanel;
  Buffer<uint32_t> words(panels * ((std::min(rows, kRowsAtOnce) + 1) / 2) * kGramPanel);
  for (; rows > 0; x += kRowsAtOnce * width, rows -= kRowsAtOnce) {
    const int64_t count = std::min(rows, kRowsAtOnce), pairs = (count + 1) / 2;
    const auto panel = [&](int64_t number) { return words.data() + number * pairs * kGramPanel; };
    pool.run(panels, [&](int64_t number) {
      const int64_t first = number * kGramPanel;
      kernels.gram.arrange(x + first, width, count, std::min(kGramPanel, width - first), panel(number));
    });
    pool.run(panels * panels, [&](int64_t item) {
      const int64_t a = item / panels, b = item % panels;
      if (a > b) return;  // a mirror image; to claim such an item costs nothing beside a product
      alignas(64) float sums[kGramPanel * kGramPanel];
      kernels.gram.multiply(panel(a), panel(b), pairs, sums);
      add_block(sums, a, b, width, gram);
    });
  }
}

}  // namespace llmopt
