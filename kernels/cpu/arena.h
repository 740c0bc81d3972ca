// Memory for packed weights, in the system's large pages where it has them: with small ones, reading a model once a
// token costs more address translations than a processor remembers.
#pragma once

#include <cstddef>

namespace llmopt {

// Zeroed, aligned to a cache line. Throws std::bad_alloc.
void* arena_allocate(size_t bytes);
void arena_free(void* memory);

}  // namespace llmopt
