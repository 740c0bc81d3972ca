// A linear operation of the decoder: weights whose outputs lie side by side, each in one of the packed layouts.
#pragma once

#include <memory>
#include <vector>

#include "dense_weight.h"
#include "kernels.h"
#include "rounded.h"

namespace llmopt {

// One of the two.
struct Part {
  const IntegerWeight* integer;
  const DenseWeight* dense;
  int64_t out() const { return integer ? integer->out() : dense->out(); }
  int64_t in() const { return integer ? integer->in() : dense->in(); }
  int64_t tiles() const { return integer ? integer->tiles() : dense->tiles(); }
};

struct PartTile {
  const Part* part;
  int64_t tile;
};

// Activations laid out for a part, in memory that is kept from call to call.
class Activations {
 public:
  // A thread keeps one of these while it multiplies by parts that are same().
  class Ready {
   public:
    Ready(const Activations& x, const Kernels& kernels, const Part& part);
    ~Ready();
    Ready(const Ready&) = delete;
    Ready& operator=(const Ready&) = delete;

   private:
    void (*end_)() = nullptr;
  };

  // `input.order` is the part's own. Does nothing where what is there was made for an equal part and `again` is false.
  void fill(ThreadPool& pool, const Kernels& kernels, const Part& part, RoundingInput input, int64_t rows);
  // Calls write(block, result) for each block, with the products [count][rows_in(block)][16] of up to kMostTiles tiles
  // of parts that are same_kind(), without biases.
  template <class Write>
  void multiply(const Kernels& kernels, const PartTile* tiles, int64_t count, Write&& write) const;
  // Whether what was made for one part serves another.
  static bool same(const Part& a, const Part& b);
  // Whether two parts that it serves differ only in their numbers.
  static bool same_kind(const Part& a, const Part& b);

  int64_t blocks() const { return (rows_ + block_rows_ - 1) / block_rows_; }
  int64_t block_rows() const { return block_rows_; }
  int64_t rows_in(int64_t block) const;

 private:
  void multiply_block(const Kernels& kernels, const PartTile* tiles, int64_t count, const uint32_t* expanded,
                      int64_t block, float* out) const;
  void multiply_dense(const Kernels& kernels, const PartTile& own, const uint32_t* expanded, int64_t block,
                      float* out) const;
  // Tiles as they are multiplied, once for several blocks; null where kernels do better with what is packed.
  const uint32_t* expand(const Kernels& kernels, const PartTile* tiles, int64_t count) const;

  int64_t rows_ = 0, block_rows_ = 1;
  RoundedRows rounded_;
  DenseRows dense_{};
  Buffer<uint32_t> pairs_;
  Buffer<float> values_, scales_;
};

// Where results go: y [rows][stride], in place of what is there or in addition to it.
struct Destination {
  float* y;
  int64_t stride;
  bool add;
};

class Linear {
 public:
  explicit Linear(std::vector<Part> parts);

  int64_t out() const { return out_; }
  int64_t in() const { return parts_[0].in(); }
  const std::vector<Part>& parts() const { return parts_; }

  // y = x · weights + biases for the rows of `input`.
  void run(ThreadPool& pool, const Kernels& kernels, Activations& scratch, const RoundingInput& input, int64_t rows,
           Destination to) const;

 private:
  std::vector<Part> parts_;
  int64_t out_ = 0;
};

// gate and up of an MLP: y = silu(x · gate) · (x · up).
class GatedLinear {
 public:
  GatedLinear(Part gate, Part up) : gate_(gate), up_(up) {}

  int64_t out() const { return gate_.out(); }
  int64_t in() const { return gate_.in(); }

  void run(ThreadPool& pool, const Kernels& kernels, Activations& scratch, Activations& other,
           const RoundingInput& input, int64_t rows, Destination to) const;

 private:
  Part gate_, up_;
};

}  // namespace llmopt
