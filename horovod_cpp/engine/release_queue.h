// Memory that the engine needs no more, until a thread that may run the owner's code lets it go: the release of a
// framework's tensor may need a lock that the background thread must never wait for.
// Any thread.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "common/guarded.h"

namespace hvd {

class ReleaseQueue : public std::enable_shared_from_this<ReleaseQueue> {
 public:
  using Release = void (*)(void* owner);

  /// A reference that, once dropped by whichever thread, queues `release(owner)`.
  std::shared_ptr<void> guard(void* owner, Release release) {
    if (release == nullptr) return nullptr;
    return {owner, [queue = shared_from_this(), release](void* dropped) {
              queue->waiting_.with([&](auto& waiting) { waiting.emplace_back(dropped, release); });
            }};
  }

  /// Calls what is queued, on this thread.
  void collect() {
    const auto due = waiting_.with([](auto& waiting) { return std::exchange(waiting, {}); });
    for (const auto& [owner, release] : due) release(owner);
  }

 private:
  Guarded<std::vector<std::pair<void*, Release>>> waiting_;
};

}  // namespace hvd
