// Ranks as threads of one process: each has its own engine over the in-process transport.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "horovod_cpp/engine/background_loop.h"
#include "ops/transport/inproc/inproc_network.h"

namespace hvd::testing {

/// One rank under test: an engine with its background thread.
class TestRank {
 public:
  struct Settings {
    Options options;
    std::vector<std::vector<int>> process_sets;
    std::vector<int> hosts;  ///< of each rank; empty: one host
    FaultHook* fault = nullptr;
    DeviceSource* devices = nullptr;
    std::string timeline;  ///< path, with {rank} in it for all ranks; empty: none from the start
    bool timeline_mark_cycles = false;
  };

  TestRank(InprocNetwork& network, int rank, Settings settings);

  int rank() const { return runtime_->rank(); }
  int size() const { return runtime_->size(); }
  Runtime& runtime() { return *runtime_; }
  BackgroundLoop& loop() { return *loop_; }
  Timeline& timeline() { return *timeline_; }

  /// Each returns the handle, or what enqueue said.
  Result<HandleRef> enqueue(TensorEntry entry, const CallSite& call_site = {});
  Result<HandleRef> allreduce_async(const std::string& name, std::span<const float> input, std::span<float> output,
                                    ReduceOp op = ReduceOp::kSum, ProcessSetId process_set = 0);
  Result<HandleRef> barrier_async(const std::string& name, ProcessSetId process_set = 0);
  /// Waits, 60 s at most, and returns the end of the operation.
  Status wait(const Result<HandleRef>& handle);
  Status allreduce(const std::string& name, std::span<const float> input, std::span<float> output,
                   ReduceOp op = ReduceOp::kSum, ProcessSetId process_set = 0) {
    return wait(allreduce_async(name, input, output, op, process_set));
  }
  Status barrier(const std::string& name, ProcessSetId process_set = 0) {
    return wait(barrier_async(name, process_set));
  }
  Result<ProcessSetId> add_process_set(const std::vector<int>& ranks);
  void shut_down() { loop_->shut_down(); }

 private:
  SteadyClock clock_;
  std::unique_ptr<EpollPoller> poller_;
  std::unique_ptr<Timeline> timeline_;
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<BackgroundLoop> loop_;
};

/// Runs `body` on `size` threads, each a rank, and shuts the job down afterwards. A failure of an expectation in one
/// rank fails the test.
void run_ranks(int size, const std::function<void(TestRank&)>& body, TestRank::Settings settings = {});

/// A request for an operation on memory of T.
TensorEntry make_entry(OpKind op, const std::string& name, DataType dtype, Shape shape, const void* input,
                       void* output);

}  // namespace hvd::testing
