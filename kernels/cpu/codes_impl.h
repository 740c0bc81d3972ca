// What the choice of codes does, in the compiler's vector types; included by kernels_impl.h.

namespace llmopt {
namespace {

constexpr int kOutputVectors = kOutputsAtOnce / kLanes;

// To the nearest of 0 .. largest, halves to even.
inline Floats to_code(Floats value, float largest) {
  const Floats low{}, high = broadcast(largest);
  value = value < low ? low : value > high ? high : value;
  return value + kRounder - kRounder;
}

// Each input's errors are gathered when its turn comes, rather than spread when they are made: they are read from the
// cache and nothing is written back.
void round_gptq(const GPTQBlock& block, int64_t output) {
  const int64_t left = block.outputs - output;
  for (int64_t i = block.first; i < block.last; ++i) {
    const float* weight = block.weight + i * block.outputs + output;
    Floats value[kOutputVectors];
    for (int v = 0; v < kOutputVectors; ++v) value[v] = load_some(weight + v * kLanes, left - v * kLanes);
    for (int64_t j = block.start; j < i; ++j) {
      const Floats factor = broadcast(-block.factor[j * block.inputs + i]);
      const float* error = block.errors + (j - block.start) * block.outputs + output;
      for (int v = 0; v < kOutputVectors; ++v) value[v] += factor * load_some(error + v * kLanes, left - v * kLanes);
    }
    const float* scales = block.scale + block.group[i] * block.outputs + output;
    const float* zeros = block.zero + block.group[i] * block.outputs + output;
    const float diagonal = block.factor[i * block.inputs + i];
    for (int v = 0; v < kOutputVectors; ++v) {
      const int64_t at = v * kLanes, count = left - at;
      const Floats scale = load_some(scales + at, count), zero = load_some(zeros + at, count);
      const Floats number = to_code(zero + value[v] / scale, block.largest);
      store(block.numbers + i * block.outputs + output + at, number, count);
      store(block.errors + (i - block.start) * block.outputs + output + at,
            (value[v] - (number - zero) * scale) / diagonal, count);
    }
  }
}

void grid_errors(const GridErrors& grid, int64_t output) {
  const int64_t last = output + kOutputsAtOnce < grid.outputs ? output + kOutputsAtOnce : grid.outputs;
  for (int64_t place = output * grid.groups; place < last * grid.groups; ++place) {
    const Floats scale = broadcast(grid.scale[place]), zero = broadcast(grid.zero[place]);
    Floats loss{};
    for (int64_t i = 0; i < grid.size; i += kLanes) {
      const Floats weight = load_some(grid.weight + place * grid.size + i, grid.size - i);
      const Floats error = (to_code(zero + weight / scale, grid.largest) - zero) * scale - weight;
      if (grid.errors) store(grid.errors + place * grid.size + i, error, grid.size - i);
      if (grid.losses) {
        const float* importance = grid.importance ? grid.importance + place % grid.groups * grid.size + i : nullptr;
        loss += error * error * (importance ? load_some(importance, grid.size - i) : broadcast(1.0F));
      }
    }
    if (grid.losses) grid.losses[place] = sum_of(loss);
  }
}

constexpr CodesKernels make_codes_kernels() { return {round_gptq, grid_errors}; }

}  // namespace
}  // namespace llmopt
