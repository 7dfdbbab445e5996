// Task<T>: a lazy coroutine. An algorithm written as one reads like its pseudocode and suspends at each wait.
// Started, resumed and destroyed under the Turn of one loop.
//
// Rules: no capturing lambda as a coroutine; parameters by value or outliving the call; no co_await inside
// `?:`, a braced initialiser or a condition with temporaries.
#pragma once

#include <coroutine>
#include <exception>
#include <optional>
#include <utility>

#include "common/check.h"

namespace hvd {

template <typename T>
class Task;

namespace detail {

class TaskPromiseBase {
 public:
  std::suspend_always initial_suspend() noexcept { return {}; }

  auto final_suspend() noexcept {
    struct ResumeContinuation {
      bool await_ready() noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<>) const noexcept {
        return continuation ? continuation : std::noop_coroutine();
      }
      void await_resume() noexcept {}
      std::coroutine_handle<> continuation;
    };
    return ResumeContinuation{continuation_};
  }

  void unhandled_exception() noexcept { exception_ = std::current_exception(); }
  void continue_with(std::coroutine_handle<> continuation) { continuation_ = continuation; }

 protected:
  void rethrow_if_failed() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::coroutine_handle<> continuation_;
  std::exception_ptr exception_;
};

template <typename T>
class TaskPromise : public TaskPromiseBase {
 public:
  Task<T> get_return_object();
  void return_value(T value) { value_ = std::move(value); }
  T take() {
    rethrow_if_failed();
    return std::move(*value_);
  }

 private:
  std::optional<T> value_;
};

template <>
class TaskPromise<void> : public TaskPromiseBase {
 public:
  Task<void> get_return_object();
  void return_void() {}
  void take() const { rethrow_if_failed(); }
};

}  // namespace detail

/// Owns the coroutine; destroying a task that has not finished destroys its frame.
template <typename T>
class [[nodiscard]] Task {
 public:
  using promise_type = detail::TaskPromise<T>;

  explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    if (this != &other) {
      destroy();
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  ~Task() { destroy(); }

  /// Awaiting starts the task and resumes the awaiter with its value (or exception) when it has finished.
  auto operator co_await() && noexcept {
    struct Awaiter {
      bool await_ready() const noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<> awaiter) noexcept {
        handle.promise().continue_with(awaiter);
        return handle;
      }
      T await_resume() { return handle.promise().take(); }
      std::coroutine_handle<promise_type> handle;
    };
    return Awaiter{handle_};
  }

 private:
  void destroy() {
    if (handle_) handle_.destroy();
  }

  std::coroutine_handle<promise_type> handle_;
};

namespace detail {

template <typename T>
Task<T> TaskPromise<T>::get_return_object() {
  return Task<T>(std::coroutine_handle<TaskPromise<T>>::from_promise(*this));
}

inline Task<void> TaskPromise<void>::get_return_object() {
  return Task<void>(std::coroutine_handle<TaskPromise<void>>::from_promise(*this));
}

}  // namespace detail
}  // namespace hvd
