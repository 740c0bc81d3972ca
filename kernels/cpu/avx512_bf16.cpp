#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include "avx512.h"

const llmopt::Kernels* llmopt::avx512_bf16_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512_bf16", [] {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  });
  return &kernels;
}
#else
const llmopt::Kernels* llmopt::avx512_bf16_kernels() { return nullptr; }
#endif
