#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "avx512.h"

const llmopt::Kernels* llmopt::avx512_amx_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512_amx", [] {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && has_amx();
  });
  return &kernels;
}
#else
const llmopt::Kernels* llmopt::avx512_amx_kernels() { return nullptr; }
#endif
