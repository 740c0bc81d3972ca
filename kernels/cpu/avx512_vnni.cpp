#include "kernels.h"

#if defined(__AVX512VNNI__)
#include "avx512.h"

const llmopt::Kernels* llmopt::avx512_vnni_kernels() {
  static constexpr Kernels kernels =
      make_kernels("avx512_vnni", [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); });
  return &kernels;
}
#else
const llmopt::Kernels* llmopt::avx512_vnni_kernels() { return nullptr; }
#endif
