// Host memory of the engine: allocated once, given out again. Buffers are aligned for any vector unit.
// Runs under the Turn; a buffer may be released by whoever drops the last reference under the Turn.
#pragma once

#include <bit>
#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace hvd {

inline constexpr std::align_val_t kBufferAlignment{64};

/// Memory that is released with its last reference; nullptr when there is none to be had. Any thread.
inline std::shared_ptr<std::byte> allocate_host(std::size_t bytes) {
  void* memory = ::operator new(bytes > 0 ? bytes : 1, kBufferAlignment, std::nothrow);
  if (memory == nullptr) return nullptr;
  return {static_cast<std::byte*>(memory), [](std::byte* place) { ::operator delete(place, kBufferAlignment); }};
}

/// Keeps what was used before, by powers of two, so that a step finds the pages of the step before.
class HostBufferPool {
 public:
  /// A buffer of at least `bytes`; nullptr when memory has run out.
  std::shared_ptr<std::byte> lease(std::size_t bytes) {
    const std::size_t size_class = std::bit_width(bytes > 0 ? bytes - 1 : 0);
    std::vector<std::shared_ptr<std::byte>>& idle = shelves_->idle[size_class];
    std::shared_ptr<std::byte> memory;
    if (idle.empty()) {
      memory = allocate_host(std::size_t{1} << size_class);
      if (!memory) return nullptr;
    } else {
      memory = std::move(idle.back());
      idle.pop_back();
    }
    std::byte* const place = memory.get();
    return {place, [shelves = shelves_, size_class, memory = std::move(memory)](std::byte*) mutable {
              shelves->idle[size_class].push_back(std::move(memory));
            }};
  }

 private:
  struct Shelves {
    std::vector<std::shared_ptr<std::byte>> idle[65];
  };
  std::shared_ptr<Shelves> shelves_ = std::make_shared<Shelves>();
};

}  // namespace hvd
