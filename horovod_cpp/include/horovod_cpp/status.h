// Status and Result<T>: how everything below the API edge reports failure. No exceptions, no globals.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>

namespace hvd {

/// What kind of failure it is; the API edge maps these to exceptions (docs/ARCHITECTURE.md, Errors).
enum class StatusCode : std::uint8_t {
  kOk = 0,
  kInvalidArgument = 1,   ///< The caller's mistake, or ranks that disagree.
  kPrecondition = 2,      ///< Not initialised, already shut down, not a member of the process set.
  kInternal = 3,          ///< A lost peer, a shutdown under way, a stall limit, a bug of ours.
  kUnavailable = 4,       ///< A library, device or transport that is not there.
  kDeadlineExceeded = 5,  ///< A wait came to its deadline.
};

/// A success, or a code with a text for people. Cheap to copy: the text is shared.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string text)
      : code_(code), text_(std::make_shared<const std::string>(std::move(text))) {}

  static Status invalid_argument(std::string text) { return {StatusCode::kInvalidArgument, std::move(text)}; }
  static Status precondition(std::string text) { return {StatusCode::kPrecondition, std::move(text)}; }
  static Status internal(std::string text) { return {StatusCode::kInternal, std::move(text)}; }
  static Status unavailable(std::string text) { return {StatusCode::kUnavailable, std::move(text)}; }
  static Status deadline_exceeded(std::string text) { return {StatusCode::kDeadlineExceeded, std::move(text)}; }

  bool ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const { return ok(); }
  StatusCode code() const { return code_; }
  /// Empty for a success.
  const std::string& text() const {
    static const std::string empty;
    return text_ ? *text_ : empty;
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::shared_ptr<const std::string> text_;
};

/// A value or the reason why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : content_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : content_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  bool ok() const { return std::holds_alternative<T>(content_); }
  explicit operator bool() const { return ok(); }
  Status status() const { return ok() ? Status() : std::get<Status>(content_); }
  T& value() & { return std::get<T>(content_); }
  const T& value() const& { return std::get<T>(content_); }
  T&& value() && { return std::get<T>(std::move(content_)); }
  T& operator*() { return value(); }
  T* operator->() { return &value(); }

 private:
  std::variant<T, Status> content_;
};

}  // namespace hvd

/// Leaves the function with the status when it is a failure.
#define HVD_RETURN_IF_ERROR(expression)                              \
  do {                                                               \
    if (::hvd::Status hvd_status = (expression); !hvd_status.ok()) { \
      return hvd_status;                                             \
    }                                                                \
  } while (false)

/// The same inside a coroutine.
#define HVD_CO_RETURN_IF_ERROR(expression)                           \
  do {                                                               \
    if (::hvd::Status hvd_status = (expression); !hvd_status.ok()) { \
      co_return hvd_status;                                          \
    }                                                                \
  } while (false)
