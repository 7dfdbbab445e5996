// The Turn: who holds it owns the state of one rank's engine. The background thread holds it while it works and gives
// it up while it sleeps; a thread that waits for a handle may take it and drive the engine itself.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>

namespace hvd {

class Turn {
 public:
  void take() {
    mutex_.lock();
    holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  }
  bool try_take() {
    if (!mutex_.try_lock()) return false;
    holder_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    return true;
  }
  /// Gives the Turn back at the end of a scope, also when something is thrown there.
  class Giver {
   public:
    explicit Giver(Turn& taken) : taken_(taken) {}
    Giver(const Giver&) = delete;
    Giver& operator=(const Giver&) = delete;
    ~Giver() { taken_.give(); }

   private:
    Turn& taken_;
  };
  void give() {
    holder_.store(std::thread::id(), std::memory_order_relaxed);
    mutex_.unlock();
  }
  /// For checks: only the holder itself can get "true".
  bool held_by_caller() const { return holder_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

 private:
  std::mutex mutex_;
  std::atomic<std::thread::id> holder_{};
};

}  // namespace hvd
