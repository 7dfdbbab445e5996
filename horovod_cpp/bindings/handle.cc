// Waits in slices so that Ctrl-C works, and gives engine memory to Python.
// See handle.h.
#include "horovod_cpp/bindings/handle.h"

#include "horovod_cpp/bindings/dlpack.h"
#include "horovod_cpp/bindings/gil.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

constexpr std::int64_t kSliceNanoseconds = 50'000'000;

template <typename Wait>
void wait_in_slices(Wait wait) {
  for (;;) {
    PyThreadState* const thread = PyEval_SaveThread();
    const int code = wait();
    take_gil(thread);
    if (code != HVD_DEADLINE_EXCEEDED) return check(code);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

}  // namespace

Handle::~Handle() {
  if (!used_after_fork()) hvd_handle_destroy(handle_);
}

void Handle::refuse_if_unusable() const {
  refuse_after_fork();
  if (handle_ == nullptr) throw py::value_error("the output of this handle was taken already");
}

void Handle::wait() {
  refuse_if_unusable();
  wait_in_slices([this] { return hvd_handle_wait(handle_, kSliceNanoseconds); });
}

void wait_all(const std::vector<Handle*>& handles) {
  std::vector<hvd_handle*> all;
  all.reserve(handles.size());
  for (const Handle* handle : handles) {
    handle->refuse_if_unusable();
    all.push_back(handle->handle_);
  }
  wait_in_slices(
      [&] { return hvd_handles_wait(all.data(), static_cast<std::int32_t>(all.size()), kSliceNanoseconds); });
}

bool Handle::poll() const {
  refuse_if_unusable();
  return hvd_handle_poll(handle_) == 1;
}

py::capsule Handle::to_dlpack() {
  refuse_if_unusable();
  hvd_output output;
  HVD_INIT_STRUCT(&output);
  check(hvd_handle_output(handle_, &output));
  return dlpack_capsule(std::exchange(handle_, nullptr), output, dtype_);
}

}  // namespace hvd::bindings
