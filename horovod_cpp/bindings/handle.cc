// Waits in slices so that Ctrl-C works, and gives engine memory to Python.
// See handle.h.
#include "horovod_cpp/bindings/handle.h"

#include <utility>

#include "horovod_cpp/bindings/dlpack.h"
#include "horovod_cpp/bindings/gil.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

constexpr std::int64_t kSliceNanoseconds = 50'000'000;

}  // namespace

void wait_in_slices(const std::function<int(std::int64_t)>& wait) {
  for (;;) {
    PyThreadState* const thread = PyEval_SaveThread();
    const int code = wait(kSliceNanoseconds);
    take_gil(thread);
    if (code != HVD_DEADLINE_EXCEEDED) return check(code);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

Handle::Handle(hvd_handle* handle, std::vector<int> dtypes)
    : handle_(handle,
              [](hvd_handle* given) {
                if (!used_after_fork()) hvd_handle_destroy(given);
              }),
      dtypes_(std::move(dtypes)) {}

void Handle::wait() {
  refuse_after_fork();
  wait_in_slices([this](std::int64_t slice) { return hvd_handle_wait(handle_.get(), slice); });
}

void wait_all(const std::vector<Handle*>& handles) {
  std::vector<hvd_handle*> all;
  refuse_after_fork();
  all.reserve(handles.size());
  for (const Handle* handle : handles) all.push_back(handle->handle_.get());
  wait_in_slices(
      [&](std::int64_t slice) { return hvd_handles_wait(all.data(), static_cast<std::int32_t>(all.size()), slice); });
}

void Handle::stream_wait(std::uintptr_t stream) {
  refuse_after_fork();
  check(hvd_handle_stream_wait(handle_.get(), reinterpret_cast<void*>(stream)));
}

void streams_wait(const std::vector<Handle*>& handles, std::uintptr_t stream) {
  std::vector<hvd_handle*> all;
  refuse_after_fork();
  all.reserve(handles.size());
  for (const Handle* handle : handles) all.push_back(handle->handle_.get());
  check(hvd_handles_stream_wait(all.data(), static_cast<std::int32_t>(all.size()), reinterpret_cast<void*>(stream)));
}

bool Handle::poll() const {
  refuse_after_fork();
  return hvd_handle_poll(handle_.get()) == 1;
}

hvd_output Handle::output(int index) const {
  refuse_after_fork();
  hvd_output output;
  HVD_INIT_STRUCT(&output);
  check(hvd_handle_group_output(handle_.get(), index, &output));
  return output;
}

std::tuple<std::uintptr_t, std::vector<std::int64_t>, int, int> Handle::output_place(int index) const {
  const hvd_output made = output(index);
  return {reinterpret_cast<std::uintptr_t>(made.data),
          {made.shape, made.shape + made.dimensions},
          dtypes_.at(static_cast<std::size_t>(index)),
          made.memory_kind == HVD_CUDA ? made.device : -1};
}

py::capsule Handle::to_dlpack(int index) const {
  return dlpack_capsule(handle_, output(index), dtypes_.at(static_cast<std::size_t>(index)));
}

std::vector<std::int64_t> Handle::received_splits() const {
  const hvd_output result = output(0);
  return {result.received_splits, result.received_splits + result.received_split_count};
}

int Handle::last_joined_rank() const { return output(0).last_joined_rank; }

int Handle::process_set() const { return output(0).process_set; }

}  // namespace hvd::bindings
