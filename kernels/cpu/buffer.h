// Memory that starts on a cache line, zeroed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "arena.h"

namespace llmopt {

template <class Element>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    if (large()) {
      data_ = static_cast<Element*>(arena_allocate(bytes()));
      return;
    }
    data_ = static_cast<Element*>(::operator new(bytes(), std::align_val_t{kAlignment}));
    std::memset(data_, 0, bytes());
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (large()) {
      arena_free(data_);
    } else {
      ::operator delete(data_, std::align_val_t{kAlignment});
    }
  }

  Element* data() { return data_; }
  const Element* data() const { return data_; }
  int64_t size() const { return size_; }
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(Element); }
  Element& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr size_t kAlignment = 64, kLarge = 1 << 12;

  // In the arena one piece follows another, so that the address sanitizer would see nothing wrong in reading on; memory
  // of its own has guards on both sides.
#if defined(__SANITIZE_ADDRESS__)
  bool large() const { return false; }
#else
  bool large() const { return bytes() >= kLarge; }
#endif

  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  Element* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace llmopt
