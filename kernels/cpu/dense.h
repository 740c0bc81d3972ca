// A weight in floating point of 16 bits or in FP8, and rows that meet it.
#pragma once

#include <cstdint>

namespace llmopt {

// [out, in] in tiles of 16 outputs, in one of three forms; the others are null.
struct DenseView {
  const uint32_t* pairs;      // bfloat16 [tiles][in / 2][16][2]
  const uint16_t* halves;     // float16 [tiles][in][16]
  const uint16_t* fp8_pairs;  // e4m3 [tiles][in / 2][16][2], multiplied as bfloat16
  const float* scales;        // [tiles][16]: of the outputs of e4m3; else null
  const float* bias;          // [tiles][16], or null
  int64_t out, in;
  bool rows_in_fp8;  // rows are rounded to e4m3, each with a scale of its own
  bool takes_pairs() const { return !halves; }
};

// Rows in blocks, narrow or wide as Rounded has them; pairs of bfloat16 where the weight takes them and the processor
// multiplies them, else floats.
struct DenseRows {
  uint32_t* pairs;  // [blocks][in / 2][block_rows], wide [blocks][block_rows][in / 2]
  float* values;    // [blocks][in][block_rows], bfloat16 numbers where the weight takes pairs
  float* scales;    // [rows], of rows in e4m3; else null
  int64_t rows, in, block_rows;
  bool wide, bfloat16;
  int64_t blocks() const { return (rows + block_rows - 1) / block_rows; }
};

struct DenseKernels {
  bool native_bfloat16;  // whether the processor multiplies pairs of bfloat16, which is then faster than float16
  // Called by a thread before and after it uses `tile` for weights with as many inputs as this one, where pairs are
  // always in wide blocks and e4m3 comes expanded; null where pairs are in narrow ones.
  void (*begin_wide)(const DenseView&);
  void (*end_wide)();
  // bfloat16 or float16 to float32.
  void (*widen)(const uint16_t* from, bool bfloat16, int64_t count, float* to);
  // Lays out the rows of one block, normed where the input says so; `scratch` holds in floats.
  void (*arrange_block)(const struct RoundingInput&, const DenseRows&, int64_t block, float* scratch);
  // A tile of e4m3 numbers as bfloat16, [in / 2][16][2].
  void (*expand)(const DenseView&, int64_t tile, uint32_t* pairs);
  // One tile times one block: out [rows of the block][16], without scales and bias.
  void (*tile)(const DenseView&, int64_t tile, const DenseRows&, int64_t block, float* out);
};

}  // namespace llmopt
