// How the functions of the C ABI tell a failure: a code to the caller, the text to hvd_last_error of the same thread.
// Any thread.
#pragma once

#include <exception>
#include <new>
#include <string>

#include <horovod_cpp/status.h>

namespace hvd::c_api {

inline std::string& last_error() {
  static thread_local std::string text;
  return text;
}

inline int report(const Status& status) {
  last_error() = status.text();
  return static_cast<int>(status.code());
}

/// Nothing in `body` throws on purpose; what the standard library throws becomes a code here.
template <typename Body>
int guarded(Body body) noexcept {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    return report(Status::internal("out of memory"));
  } catch (const std::exception& error) {
    return report(Status::internal(error.what()));
  }
}

}  // namespace hvd::c_api
