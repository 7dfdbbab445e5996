// Owns a handle of the C ABI; Python's `_core.Handle`.
// Any thread, one wait at a time; the GIL is let go while it waits.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "horovod_cpp/bindings/bind.h"

namespace hvd::bindings {

class Handle {
 public:
  Handle(hvd_handle* handle, int dtype) : handle_(handle), dtype_(dtype) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)), dtype_(other.dtype_) {}
  Handle& operator=(Handle&&) = delete;
  ~Handle();

  /// Blocks until done, with a look at Python's signals every 50 ms. Throws ApiError with the operation's failure, or
  /// what a signal handler raised; then the operation goes on and wait() may be called again.
  void wait();
  bool poll() const;
  /// The output that the engine made (allgather) as a DLPack capsule, which takes the handle with it. Once, after
  /// wait().
  pybind11::capsule to_dlpack();

  /// Blocks as `wait` does until all are done, be it well or with a failure.
  friend void wait_all(const std::vector<Handle*>& handles);

 private:
  void refuse_if_unusable() const;

  hvd_handle* handle_;
  int dtype_;
};

void wait_all(const std::vector<Handle*>& handles);

}  // namespace hvd::bindings
