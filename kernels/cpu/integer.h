// What the integer kernels read: weights in codes, and activations rounded to 8 bits in steps. See README.md.
#pragma once

#include <cstdint>

namespace llmopt {

constexpr int kTile = 16;  // outputs that lie side by side

// How codes are stored: as unsigned integers of 4, 6 or 8 bits, or as FP4 (E2M1), whose numbers 0, 0.5, 1, 1.5, 2, 3, 4
// and 6 become whole when they are doubled; the scales are halved instead.
enum class Stored { k4Bits, k6Bits, k8Bits, kFp4 };

constexpr int bits_of(Stored stored) { return stored == Stored::k8Bits ? 8 : stored == Stored::k6Bits ? 6 : 4; }

// Scales or minimums of a weight, [tiles][groups][16], in one of four forms; the others are null.
struct GroupNumbers {
  const uint16_t* halves;  // float16
  const float* floats;
  const int8_t* bytes;   // small integers, times factors
  const uint8_t* fp8;    // e4m3, read as 1/256 of the numbers, times factors
  const float* factors;  // [tiles][groups / run][16]
  int64_t run = 1;       // groups that share a factor
  bool present() const { return halves || floats || bytes || fp8; }
};

// A packed weight [out, in]: scale · (code − zero), or scale · code + minimum. Where both zeros and minimums are absent
// the zero point is the middle of what is stored (of FP4, 0). A step is a run of inputs within a group that share one
// scale of the activations.
struct IntegerView {
  const uint32_t* words;  // 4 bits: [tiles][in / 8][16]; 6: [tiles][in / 16][3][16]; 8: [tiles][in / 4][16]
  GroupNumbers scales, minimums;
  const uint8_t* zeros;  // [tiles][groups][16]
  const float* bias;     // [tiles][16], or null
  int64_t out, in, groups, steps;
  Stored stored;
};

// Rows of x in blocks of `block_rows`, of which the last may hold fewer. Within a narrow block rows alternate, so that a
// kernel walks through it with one pointer; in a wide one each row lies by itself.
struct Rounded {
  uint32_t* codes;  // [blocks][in / 4][block_rows], wide [blocks][block_rows][in / 4]: four signed codes of one row
  float* scales;    // [blocks][steps][block_rows]
  int32_t* sums;    // [blocks][steps][block_rows]: −8 times the sum of a step's codes
  float* totals;    // [blocks][steps][block_rows]: the sum of a step's rounded numbers
  int64_t rows, in, steps, block_rows;
  bool wide;
  int64_t blocks() const { return (rows + block_rows - 1) / block_rows; }
  int64_t rows_in(int64_t block) const {
    const int64_t left = rows - block * block_rows;
    return left < block_rows ? left : block_rows;
  }
};

// Rows to be rounded: element i is x[row][order[i]] · inverse_rms · norm[order[i]].
struct RoundingInput {
  const float* x;  // [rows][x_stride]
  int64_t x_stride, width;
  const int32_t* order;  // [in], −1 for a zero; null for as it is, then in = width
  const float* norm;     // [width]; null for no norm
  float eps;
};

// One tile of a weight.
struct TileOf {
  const IntegerView* weight;
  int64_t tile;
};

// Products of many rows at once, by a processor that multiplies whole tiles; null where it does not.
struct WideKernels {
  int64_t least_rows;  // from so many on they are faster than the others
  int64_t block_unit;  // rows of a block are one or two of it; x holds whole blocks, whatever is in rows it has not
  // A thread calls them before and after it uses the others for weights with as many inputs and steps as this one.
  void (*begin)(const IntegerView&);
  void (*end)();
  // The codes of `count` tiles [count][in / 4][16], a byte each.
  void (*expand)(const TileOf* tiles, int64_t count, uint32_t* codes);
  // IntegerKernels::tiles for a wide block; the bits of a result are the same. `codes` are expanded, for several blocks,
  // or null.
  void (*tiles)(const TileOf* tiles, int64_t count, const uint32_t* codes, const Rounded&, int64_t block, float* out);
};

struct IntegerKernels {
  int64_t block_rows;      // at most so many rows in a narrow block
  int64_t tiles_together;  // so many tiles are fastest at once
  // Rounds the rows of one block; `scratch` holds in floats.
  void (*round_block)(const RoundingInput&, const Rounded&, int64_t block, float* scratch);
  // `count` tiles times one block: out [count][rows of the block][16], without the bias. The tiles' weights may differ,
  // but only in their numbers.
  void (*tiles)(const TileOf* tiles, int64_t count, const Rounded&, int64_t block, float* out);
  // What becomes of the results of one tile, [rows][16], in y [rows][y_stride]: y = or +=.
  void (*write)(const float* tile, const float* bias, float* y, int64_t y_stride, int64_t rows, int64_t count,
                bool add);
  // The same for y = silu(gate) · up.
  void (*write_silu)(const float* gate, const float* gate_bias, const float* up, const float* up_bias, float* y,
                     int64_t y_stride, int64_t rows, int64_t count);
  // y = x / sqrt(mean(x²) + eps) · norm.
  void (*norm_row)(const float* x, const float* norm, float eps, int64_t width, float* y);
  // Multiplies and adds 8-bit numbers in registers; how many operations that were.
  int64_t (*peak)(int64_t rounds);
  WideKernels wide;
};

}  // namespace llmopt
