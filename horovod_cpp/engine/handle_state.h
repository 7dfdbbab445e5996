// What a handle shares with the engine: the end of an operation, and its result. Waiters sleep on a condition.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "common/clock.h"
#include "horovod_cpp/engine/request_response.h"
#include "ops/device/device_memory.h"

namespace hvd {

/// A tensor that the engine made: its memory lives as long as somebody holds it.
struct OutputTensor {
  std::shared_ptr<std::byte> memory;
  std::shared_ptr<DeviceBlock> block;  ///< of device memory: where it comes from
  std::size_t bytes = 0;
  Shape shape;
};

/// What an operation results in beside the memory that its caller gave.
struct OperationOutput {
  std::vector<OutputTensor> tensors;   ///< allgather, reducescatter, alltoall: one, or those of the group
  std::vector<std::int64_t> received;  ///< alltoall: rows from each rank of the set
  ProcessSetId process_set = 0;        ///< adding a process set
  int last_joined = -1;                ///< join: the rank that joined last
  /// On device memory an operation is done for the host once its work is in line: a stream that uses the results waits
  /// for this.
  DeviceMarkRef launched;
};

class HandleState {
 public:
  /// Any thread.
  bool done() const { return done_.load(std::memory_order_acquire); }  // acquire: pairs with the store in complete()

  /// Ends the operation, once. The holder of the Turn.
  void complete(Status status) {
    {
      const std::scoped_lock lock(mutex_);
      status_ = std::move(status);
      done_.store(true, std::memory_order_release);
    }
    condition_.notify_all();
  }

  /// Sleeps until the operation is done or `deadline` came; returns whether it is done. Any thread.
  bool wait_until(TimePoint deadline) {
    std::unique_lock lock(mutex_);
    const auto is_done = [this] { return done_.load(std::memory_order_relaxed); };
    if (deadline != kNever) return condition_.wait_until(lock, deadline, is_done);
    condition_.wait(lock, is_done);
    return true;
  }

  /// Once done, any thread.
  const Status& status() const { return status_; }
  OperationOutput& output() { return output_; }

 private:
  std::atomic<bool> done_{false};
  std::mutex mutex_;
  std::condition_variable condition_;
  Status status_;
  OperationOutput output_;
};

using HandleRef = std::shared_ptr<HandleState>;

}  // namespace hvd
