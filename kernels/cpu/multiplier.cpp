#include "multiplier.h"

#include <atomic>
#include <chrono>
#include <stdexcept>

#include "attention.h"

namespace llmopt {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

int checked(int threads) {
  require(threads >= 1, "threads must be at least 1");
  return threads;
}

// Those that this processor has, fastest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> result;
  for (const Kernels* kernels :
       {avx512_amx_kernels(), avx512_bf16_kernels(), avx512_vnni_kernels(), avx512_kernels(), avx2_kernels(),
        plain_kernels()}) {
    if (kernels && kernels->supported()) result.push_back(kernels);
  }
  return result;
}

const Kernels& find_kernels(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (name == "auto" || name == kernels->name) return *kernels;
  }
  std::string known;
  for (const std::string& one : instruction_sets()) known += ", " + one;
  throw std::invalid_argument("instruction set '" + name + "' is not here; this processor has: auto" + known);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

Multiplier::Multiplier(int threads, const std::string& instruction_set)
    : kernels_(find_kernels(instruction_set)), pool_(checked(threads)) {}

void Multiplier::attend(uintptr_t queries, uintptr_t out, uintptr_t keys, uintptr_t values, uintptr_t tables,
                        uintptr_t contexts, int64_t sequences, int64_t table_width, int64_t heads, int64_t kv_heads,
                        int64_t head_dim, int64_t block_size, int64_t window, float scale) {
  require(head_dim % kTile == 0 && kv_heads > 0 && heads % kv_heads == 0,
          "the head size must be a multiple of 16, and key heads must divide heads");
  llmopt::attend(pool_, kernels_,
                 {reinterpret_cast<const float*>(queries), reinterpret_cast<float*>(out),
                  reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values),
                  reinterpret_cast<const int32_t*>(tables), reinterpret_cast<const int32_t*>(contexts), sequences,
                  table_width, heads, kv_heads, head_dim, block_size, window, scale});
}

double Multiplier::peak_int8_ops() {
  constexpr int64_t kRounds = 1 << 15, kItems = 64;
  std::atomic<int64_t> operations{0};
  const auto start = std::chrono::steady_clock::now();
  pool_.run(kItems, [&](int64_t) { operations += kernels_.integer.peak(kRounds); });
  return static_cast<double>(operations) /
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace llmopt
