// Owns a handle of the C ABI; Python's `_core.Handle`.
// Any thread, one wait at a time; the GIL is let go while it waits.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "horovod_cpp/bindings/bind.h"

namespace hvd::bindings {

class Handle {
 public:
  /// `dtypes`: of the tensors of the operation.
  Handle(hvd_handle* handle, std::vector<int> dtypes);

  /// Blocks until done, with a look at Python's signals every 50 ms. Throws ApiError with the operation's failure, or
  /// what a signal handler raised; then the operation goes on and wait() may be called again.
  void wait();
  bool poll() const;
  /// After wait(): lets a CUDA stream wait for the results. Does not block.
  void stream_wait(std::uintptr_t stream);
  /// Of an output that the engine made, after wait(): its address, shape, hvd_dtype, and its device or -1 for host
  /// memory. Valid as long as this object.
  std::tuple<std::uintptr_t, std::vector<std::int64_t>, int, int> output_place(int index) const;
  /// The same as a DLPack capsule; its memory outlives the handle. All capsules of an output share its memory.
  pybind11::capsule to_dlpack(int index) const;
  /// After wait(), of an alltoall: rows from each rank of the set.
  std::vector<std::int64_t> received_splits() const;
  /// After wait(), of a join.
  int last_joined_rank() const;
  /// After wait(), of a process set that was added.
  int process_set() const;

  /// Blocks as `wait` does until all are done, be it well or with a failure.
  friend void wait_all(const std::vector<Handle*>& handles);
  /// As `stream_wait`, for many.
  friend void streams_wait(const std::vector<Handle*>& handles, std::uintptr_t stream);

 private:
  hvd_output output(int index) const;

  std::shared_ptr<hvd_handle> handle_;
  std::vector<int> dtypes_;
};

/// Calls `wait` with a limit in nanoseconds, without the GIL, until it gives something else than
/// HVD_DEADLINE_EXCEEDED, with a look at Python's signals in between.
void wait_in_slices(const std::function<int(std::int64_t)>& wait);

void wait_all(const std::vector<Handle*>& handles);
void streams_wait(const std::vector<Handle*>& handles, std::uintptr_t stream);

}  // namespace hvd::bindings
