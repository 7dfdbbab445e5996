// Handles: the caller's end of an operation that is in flight, and outputs that the library made.
// A handle may be used by any thread, by one at a time.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <source_location>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <horovod_cpp/c_api.h>
#include <horovod_cpp/element.h>
#include <horovod_cpp/error.h>

namespace hvd {
namespace detail {

/// Owns a handle of the C ABI, and knows what to call the operation in messages.
class Operation {
 public:
  Operation() = default;
  Operation(hvd_handle* handle, std::string text, const std::source_location& site, int tensors = 1)
      : handle_(handle), text_(std::move(text)), site_(site), tensors_(tensors) {}

  bool empty() const { return handle_ == nullptr; }
  hvd_handle* get() const { return handle_.get(); }
  bool done() const { return hvd_handle_poll(handle_.get()) == 1; }
  bool wait_for(std::chrono::nanoseconds limit) const {
    hvd_handle* const one = handle_.get();
    return hvd_handles_wait(&one, 1, std::max<std::int64_t>(limit.count(), 0)) == HVD_OK;
  }
  void wait() const { check(hvd_handle_wait(handle_.get(), /*limit_nanoseconds=*/-1), text_, site_); }
  int tensors() const { return tensors_; }  // of a group; 1 of others
  hvd_output output(int index = 0) const {
    hvd_output output;
    HVD_INIT_STRUCT(&output);
    check(hvd_handle_group_output(handle_.get(), index, &output), text_, site_);
    return output;
  }
  void require(const std::source_location& site) const {
    if (empty()) raise(StatusCode::kPrecondition, "wait", "the handle is empty: its result has been taken", site);
  }

 private:
  struct Destroy {
    void operator()(hvd_handle* handle) const { hvd_handle_destroy(handle); }
  };
  std::unique_ptr<hvd_handle, Destroy> handle_;
  std::string text_;
  std::source_location site_;
  int tensors_ = 1;
};

}  // namespace detail

/// An output that the library made: dense elements in host memory, which live as long as this object. Move-only.
template <Element T>
class Output {
 public:
  explicit Output(detail::Operation operation) : operation_(std::move(operation)) {
    const hvd_output output = operation_.output();
    elements_ = {static_cast<T*>(output.data), static_cast<std::size_t>(output.bytes) / sizeof(T)};
    received_splits_ = {output.received_splits, static_cast<std::size_t>(output.received_split_count)};
  }

  std::span<T> elements() const { return elements_; }
  T* data() const { return elements_.data(); }
  std::size_t size() const { return elements_.size(); }
  T& operator[](std::size_t index) const { return elements_[index]; }
  auto begin() const { return elements_.begin(); }
  auto end() const { return elements_.end(); }
  /// Of an alltoall: how many elements came from each rank of the set. Empty for others.
  std::span<const std::int64_t> received_splits() const { return received_splits_; }

 private:
  detail::Operation operation_;
  std::span<T> elements_;
  std::span<const std::int64_t> received_splits_;
};

/// An operation in flight. `Result` is what wait() gives: void, an Output, or the number of a rank. Move-only.
/// The memory that was handed over stays untouched until the operation is done. A handle that is dropped before waits,
/// and forgets a failure: that memory may be gone next.
template <typename Result>
class [[nodiscard]] Handle {
 public:
  Handle() = default;
  explicit Handle(detail::Operation operation) : operation_(std::move(operation)) {}
  Handle(Handle&&) noexcept = default;
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      finish();
      operation_ = std::move(other.operation_);
    }
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { finish(); }

  /// False once wait() has been called, and for a handle that was made empty or moved from.
  bool valid() const { return !operation_.empty(); }

  /// Whether wait() would not block. Asking gets the operation under way.
  bool done(std::source_location site = std::source_location::current()) const {
    operation_.require(site);
    return operation_.done();
  }

  /// Blocks until the operation is done, be it well or with a failure, or the limit has passed. Returns whether it is
  /// done.
  bool wait_for(std::chrono::nanoseconds limit, std::source_location site = std::source_location::current()) const {
    operation_.require(site);
    return operation_.wait_for(limit);
  }

  /// Blocks until the operation is done, and gives its result, once. Throws InvalidArgument if ranks disagree,
  /// InternalError if one is lost or has shut the job down.
  Result wait(std::source_location site = std::source_location::current()) {
    operation_.require(site);
    detail::Operation operation = std::exchange(operation_, {});  // NOLINT(misc-const-correctness): moved for an Output
    operation.wait();
    if constexpr (std::is_same_v<Result, int>) {
      return operation.output().last_joined_rank;
    } else if constexpr (!std::is_void_v<Result>) {
      return Result(std::move(operation));
    }
  }

  template <typename Other>
  friend void wait_all(std::span<Handle<Other>> handles);

 private:
  void finish() noexcept {
    if (operation_.empty()) return;
    hvd_handle* const one = operation_.get();
    hvd_handles_wait(&one, 1, /*limit_nanoseconds=*/-1);
  }

  detail::Operation operation_;
};

/// Blocks until all are done, be it well or with a failure, which their own wait() tells then. Less than many waits.
template <typename Result>
void wait_all(std::span<Handle<Result>> handles) {
  std::vector<hvd_handle*> all;
  for (const Handle<Result>& handle : handles) {
    if (handle.valid()) all.push_back(handle.operation_.get());
  }
  hvd_handles_wait(all.data(), static_cast<std::int32_t>(all.size()), /*limit_nanoseconds=*/-1);
}

}  // namespace hvd
