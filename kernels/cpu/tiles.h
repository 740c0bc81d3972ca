// Outputs side by side, as all packed weights have them.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "integer.h"

namespace llmopt {

// values [out][columns] to [tiles][columns / run][16][run], zeros where there is no output.
template <class Element>
Buffer<Element> in_tiles(const Element* values, int64_t out, int64_t columns, int64_t run = 1) {
  Buffer<Element> result((out + kTile - 1) / kTile * columns * kTile);
  for (int64_t output = 0; output < out; ++output) {
    Element* to = result.data() + output / kTile * columns * kTile + output % kTile * run;
    for (int64_t i = 0; i < columns; ++i) to[i / run * run * kTile + i % run] = values[output * columns + i];
  }
  return result;
}

}  // namespace llmopt
