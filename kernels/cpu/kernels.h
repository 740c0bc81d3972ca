// What one instruction set offers: a table of functions. This header and those that include it in the files of an
// instruction set use no standard containers, because the linker keeps only one copy of an inline function and that
// copy must not hold instructions that the processor lacks.
#pragma once

#include <cstdint>

#include "codes_kernels.h"
#include "dense.h"
#include "gram_kernels.h"
#include "integer.h"
#include "paged_cache.h"
#include "sample_kernels.h"

namespace llmopt {

// A packed weight, [out, in], as the kernels read it; see README.md for the layout. Arrays that may be absent are null.
struct WeightView {
  const uint32_t* words;  // [tiles][in * bits / 32][16]: signed codes of consecutive inputs, lowest bits first
  const float* scales;    // [tiles][groups][16]
  const uint8_t* zeros;   // [tiles][groups][16], or null where every zero point is the middle code
  const float* bias;      // [tiles][16], or null
  const int32_t* sums;    // [tiles][16]: sums of codes over the inputs, for integer activations only
  int64_t out, in, groups;
  int bits;    // 4 or 8, as stored
  int middle;  // what was subtracted from every code, and is to be subtracted from every zero point
};

// Rows of activations and of the result.
struct Rows {
  const float* x;  // [rows][in], `x_stride` floats from one row to the next
  float* y;        // [rows][out], `y_stride` floats from one row to the next
  int64_t count, x_stride, y_stride;
};

// Tiles first .. last - 1 of a weight.
struct Tiles {
  int64_t first, last;
};

// The query heads that share one key head of one sequence, and that head's part of the paged cache.
struct AttentionItem {
  const float* queries;  // [heads][head_dim]
  float* out;            // [heads][head_dim]
  const float* keys;     // of the head in block 0; a token's are `stride` floats after the token's before
  const float* values;   // likewise
  const int32_t* table;  // numbers of the sequence's blocks, in order
  int64_t first, last;   // the query sees the tokens first .. last - 1
  int64_t heads, head_dim, stride, block_size;
  float scale;
};

struct Kernels {
  const char* name;
  bool (*supported)();
  int64_t fused_rows;   // up to so many rows, `fused` may be called
  int64_t panel_tiles;  // tiles that `panels` and `integers` take at a time

  // y = x · dequantized weight + bias, dequantized in registers.
  void (*fused)(const WeightView&, Tiles, const Rows&);
  // The same, dequantizing into `panel`, panel_tiles * in * 16 floats, first.
  void (*panels)(const WeightView&, Tiles, const Rows&, float* panel);
  // Rounds a row of x to signed 8-bit codes, each with kActivationOffset added, and returns the scale:
  // the largest magnitude / 127.
  float (*round_row)(const float* x, int64_t count, uint8_t* codes);
  // The product of codes [rows][in] from round_row and 8-bit codes of the weight, summed exactly, then scaled.
  void (*integers)(const WeightView&, Tiles, const Rows&, const uint8_t* codes, const float* row_scales);
  // softmax(scale · query · keysᵀ) · values; `scores` holds heads * (last - first) floats. head_dim must be a multiple
  // of kTile.
  void (*attend)(const AttentionItem&, float* scores);

  // Attention over a cache of bfloat16 or 8-bit numbers.
  PagedKernels paged;
  IntegerKernels integer;
  DenseKernels dense;
  SampleKernels sample;
  GramKernels gram;
  CodesKernels codes;
};

// Null where the compiler could not build it.
const Kernels* plain_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_amx_kernels();

}  // namespace llmopt
