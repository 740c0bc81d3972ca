#include "kernels.h"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "avx512.h"

const llmopt::Kernels* llmopt::avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512", [] { return has_avx512(); });
  return &kernels;
}
#else
const llmopt::Kernels* llmopt::avx512_kernels() { return nullptr; }
#endif
