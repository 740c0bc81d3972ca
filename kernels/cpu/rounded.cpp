#include "rounded.h"

#include <algorithm>

namespace llmopt {
namespace {

template <class Element>
Element* grown(Buffer<Element>& buffer, int64_t size) {
  if (buffer.size() < size) buffer = Buffer<Element>(size + size / 4);
  return buffer.data();
}

}  // namespace

bool is_wide(const IntegerKernels& kernels, int64_t rows) {
  return kernels.wide.tiles && rows >= kernels.wide.least_rows;
}

int64_t rows_of_block(const IntegerKernels& kernels, int64_t rows, bool wide) {
  if (wide) return rows > kernels.wide.block_unit ? 2 * kernels.wide.block_unit : kernels.wide.block_unit;
  const int64_t blocks = (rows + kernels.block_rows - 1) / kernels.block_rows;
  return (rows + blocks - 1) / blocks;
}

void RoundedRows::fill(ThreadPool& pool, const IntegerKernels& kernels, const IntegerWeight& weight,
                       RoundingInput input, int64_t rows) {
  const IntegerView& like = weight.view();
  const bool wide = is_wide(kernels, rows);
  view_ = {nullptr, nullptr, nullptr, nullptr, rows, like.in, like.steps, rows_of_block(kernels, rows, wide), wide};
  const int64_t held = view_.blocks() * view_.block_rows;
  view_.codes = grown(codes_, held * like.in / 4);
  view_.scales = grown(scales_, held * like.steps);
  view_.sums = grown(sums_, held * like.steps);
  view_.totals = grown(totals_, held * like.steps);
  input.order = weight.order().empty() ? nullptr : weight.order().data();
  pool.run(view_.blocks(), [&](int64_t block) {
    thread_local Buffer<float> scratch;
    if (scratch.size() < like.in) scratch = Buffer<float>(like.in);
    kernels.round_block(input, view_, block, scratch.data());
  });
}

bool RoundedRows::same(const IntegerWeight& a, const IntegerWeight& b) {
  return a.view().in == b.view().in && a.view().steps == b.view().steps && a.order() == b.order();
}

}  // namespace llmopt
