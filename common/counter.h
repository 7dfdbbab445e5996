// A number that one thread at a time counts up and any thread may read.
#pragma once

#include <atomic>
#include <cstdint>

namespace hvd {

/// Relaxed order throughout: who learns of an event through something stronger (the end of a handle) reads its count.
class Counter {
 public:
  Counter() = default;
  Counter(const Counter& other) : value_(other.value()) {}
  Counter& operator=(const Counter& other) {
    value_.store(other.value(), std::memory_order_relaxed);
    return *this;
  }

  /// Only one thread at a time, so no read-modify-write is needed.
  void add(std::int64_t count) { value_.store(value() + count, std::memory_order_relaxed); }
  std::int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> value_{0};
};

}  // namespace hvd
