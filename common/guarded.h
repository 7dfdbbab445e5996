// A value and the mutex that guards it: the value cannot be reached without the lock.
#pragma once

#include <mutex>
#include <utility>

namespace hvd {

/// Any thread. No callback, log line or foreign call belongs inside `with`.
template <typename T>
class Guarded {
 public:
  template <typename... Args>
  explicit Guarded(Args&&... args) : value_(std::forward<Args>(args)...) {}

  template <typename Function>
  decltype(auto) with(Function&& function) {
    const std::scoped_lock lock(mutex_);
    return std::forward<Function>(function)(value_);
  }

  template <typename Function>
  decltype(auto) with(Function&& function) const {
    const std::scoped_lock lock(mutex_);
    return std::forward<Function>(function)(value_);
  }

 private:
  mutable std::mutex mutex_;
  T value_;
};

}  // namespace hvd
