#include "arena.h"

#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <new>

namespace llmopt {
namespace {

constexpr size_t kLargePage = 2 << 20, kRegion = 32 << 20, kLine = 64;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// A run of large pages that is given out from its beginning to its end, and given back when nothing of it is in use.
struct Region {
  size_t size = 0, used = 0, pieces = 0;
};

std::mutex guard;

std::map<uintptr_t, Region>& regions() {
  static auto* all = new std::map<uintptr_t, Region>;  // never destroyed: weights may be freed after static objects
  return *all;
}

uintptr_t map_region(size_t size) {
  void* mapped = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<uintptr_t>(mapped), aligned = rounded_up(start, kLargePage);
  if (aligned > start) munmap(mapped, aligned - start);
  munmap(reinterpret_cast<void*>(aligned + size), start + kLargePage - aligned);
#if defined(MADV_HUGEPAGE)
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
#endif
  regions()[aligned] = {size, 0, 0};
  return aligned;
}

}  // namespace

void* arena_allocate(size_t bytes) {
  const size_t wanted = rounded_up(bytes, kLine);
  std::lock_guard lock(guard);
  auto& all = regions();
  auto place = all.begin();
  while (place != all.end() && place->second.used + wanted > place->second.size) ++place;
  if (place == all.end()) place = all.find(map_region(rounded_up(wanted > kRegion ? wanted : kRegion, kLargePage)));
  Region& region = place->second;
  void* memory = reinterpret_cast<void*>(place->first + region.used);
  region.used += wanted;
  ++region.pieces;
  return memory;
}

void arena_free(void* memory) {
  std::lock_guard lock(guard);
  auto& all = regions();
  auto place = --all.upper_bound(reinterpret_cast<uintptr_t>(memory));
  if (--place->second.pieces > 0) return;
  munmap(reinterpret_cast<void*>(place->first), place->second.size);
  all.erase(place);
}

}  // namespace llmopt
