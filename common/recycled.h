// What every operation needs anew and is used again: memory of single objects, and objects with the room that they
// have.
#pragma once

#include <array>
#include <cstddef>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "common/guarded.h"

namespace hvd {

/// For std::allocate_shared and the like. Any thread; memory that one thread let go another one gets. At most kMost
/// objects are kept, for good. Under AddressSanitizer nothing is kept: it would not see a use after free.
template <typename T>
class Recycled {
 public:
  using value_type = T;

  Recycled() = default;
  template <typename Other>
  Recycled(const Recycled<Other>& /*other*/) {}  // NOLINT(google-explicit-constructor): what allocators are asked for
  bool operator==(const Recycled& /*other*/) const { return true; }

  T* allocate(std::size_t count) {
    if (count == 1) {
      Kept& here = kept();
      const std::scoped_lock lock(here.mutex);
      if (here.count > 0) return static_cast<T*>(here.memory[--here.count]);
    }
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(alignof(T))));
  }

  void deallocate(T* memory, std::size_t count) {
#if !defined(__SANITIZE_ADDRESS__)
    if (count == 1) {
      Kept& here = kept();
      const std::scoped_lock lock(here.mutex);
      if (here.count < kMost) {
        here.memory[here.count++] = memory;
        return;
      }
    }
#endif
    ::operator delete(memory, count * sizeof(T), std::align_val_t(alignof(T)));
  }

 private:
  static constexpr std::size_t kMost = 1024;
  struct Kept {
    std::mutex mutex;
    std::array<void*, kMost> memory{};
    std::size_t count = 0;
  };

  static Kept& kept() {
    static auto* const instance = new Kept;  // never destroyed: objects may outlive static destructors
    return *instance;
  }
};

/// Objects that were given back, for the next who needs one. Any thread; at most kMost are kept.
template <typename T>
class Spares {
 public:
  Spares() {
    kept_.with([](auto& kept) { kept.reserve(kMost); });
  }

  std::optional<T> take() {
    return kept_.with([](auto& kept) {
      std::optional<T> last;
      if (!kept.empty()) {
        last.emplace(std::move(kept.back()));
        kept.pop_back();
      }
      return last;
    });
  }

  /// Does not allocate; `spare` has let go of all that must not live on.
  void keep(T spare) {
    kept_.with([&](auto& kept) {
      if (kept.size() < kMost) kept.push_back(std::move(spare));
    });
  }

 private:
  static constexpr std::size_t kMost = 1024;  // as many as are in flight at a time in a step of most networks
  Guarded<std::vector<T>> kept_;
};

}  // namespace hvd
