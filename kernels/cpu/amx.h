// The matrix unit of some processors (AMX): eight tile registers of up to 16 rows of 64 bytes, which one instruction
// multiplies. Included by the file of that instruction set only.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace llmopt {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;

// The shapes of the tile registers, in the form that the processor loads. Those not set cannot be used.
class alignas(64) TileShapes {
 public:
  // `bytes` of a row must be a multiple of 4.
  void set(int tile, int64_t rows, int64_t bytes) {
    bytes_[tile] = static_cast<uint16_t>(bytes);
    rows_[tile] = static_cast<uint8_t>(rows);
  }
  // Other code may have used the registers since, so that they are loaded anew for each piece of work.
  void use() const {
    asm volatile("" : : "r"(this) : "memory");  // the compiler believes that only the first eight bytes are read
    _tile_loadconfig(this);
  }

 private:
  uint8_t palette_ = 1, start_row_ = 0, reserved_[14] = {};
  uint16_t bytes_[16] = {};
  uint8_t rows_[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// Whether the processor has such tiles, of 8-bit and of bfloat16 numbers, and Linux lets this process use them: their
// state is so large that each process must ask for it once.
inline bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24, kAmxInt8 = 1U << 25;  // of CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;                        // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAll = kAmxBf16 | kAmxTile | kAmxInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace llmopt
