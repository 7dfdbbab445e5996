// Memory that the engine needs no more, until a thread that may run the owner's code lets it go: the release of a
// framework's tensor may need a lock that the background thread must never wait for.
// Any thread.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "common/guarded.h"
#include "common/recycled.h"

namespace hvd {

class ReleaseQueue : public std::enable_shared_from_this<ReleaseQueue> {
 public:
  using ReleaseFunction = void (*)(void* owner);

  /// Queues `release(owner)` once the last reference is gone, from whichever thread; unless it was told not to.
  class Guard {
   public:
    Guard(std::shared_ptr<ReleaseQueue> queue, void* owner, ReleaseFunction release)
        : queue_(std::move(queue)), owner_(owner), release_(release) {}
    ~Guard() {
      if (release_ != nullptr) queue_->state_.with([&](State& state) { state.waiting.push_back({owner_, release_}); });
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

    /// The owner has not been handed over after all. Before any other thread has the reference.
    void disarm() { release_ = nullptr; }

   private:
    std::shared_ptr<ReleaseQueue> queue_;
    void* owner_;
    ReleaseFunction release_;
  };

  /// nullptr where there is nothing to call.
  std::shared_ptr<Guard> guard(void* owner, ReleaseFunction release) {
    if (release == nullptr) return nullptr;
    return std::allocate_shared<Guard>(Recycled<Guard>(), shared_from_this(), owner, release);
  }

  /// Calls what is queued, on this thread.
  void collect() {
    std::vector<Release> due;
    state_.with([&](State& state) {
      if (state.waiting.empty()) return;
      due.swap(state.spare);
      due.swap(state.waiting);
    });
    if (due.empty()) return;
    for (const Release& release : due) release.call(release.owner);  // which may come here again
    due.clear();
    state_.with([&](State& state) {
      if (state.spare.capacity() < due.capacity()) state.spare.swap(due);
    });
  }

 private:
  struct Release {
    void* owner;
    ReleaseFunction call;
  };
  struct State {
    std::vector<Release> waiting;
    std::vector<Release> spare;  // empty, with room
  };

  Guarded<State> state_;
};

}  // namespace hvd
