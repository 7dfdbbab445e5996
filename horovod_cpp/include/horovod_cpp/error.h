// What the C++ functions throw: one class for each kind of failure, with the rank and the operation that it happened
// to.
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

#include <horovod_cpp/c_api.h>
#include <horovod_cpp/status.h>

namespace hvd {

/// Base of all. what() holds the rank, the operation, the reason, and where the program called:
/// "rank 1: allreduce 'loss': ... [train.cc:42]".
class HVD_API Error : public std::runtime_error {
 public:
  Error(StatusCode code, int rank, std::string operation, const std::string& text)
      : std::runtime_error(text), code_(code), rank_(rank), operation_(std::move(operation)) {}

  StatusCode code() const { return code_; }
  /// Global rank of the process that throws; -1 where it is in no job.
  int rank() const { return rank_; }
  /// Kind and name: "allreduce 'loss'", "unnamed barrier"; for other functions their name: "init".
  const std::string& operation() const { return operation_; }

 private:
  StatusCode code_;
  int rank_;
  std::string operation_;
};

/// The caller's mistake, or ranks that disagree about an operation; the job goes on.
class HVD_API InvalidArgument : public Error {
  using Error::Error;
};
/// Not initialised, shut down, or not a member of the process set.
class HVD_API PreconditionError : public Error {
  using Error::Error;
};
/// A lost rank, the shutdown of another one, a stall limit. What travels through the process set is over.
class HVD_API InternalError : public Error {
  using Error::Error;
};
/// A library, device or transport that is not there.
class HVD_API Unavailable : public Error {
  using Error::Error;
};

namespace detail {

/// The rank of this process, or -1.
inline int rank_or_none() {
  hvd_topology topology;
  HVD_INIT_STRUCT(&topology);
  return hvd_get_topology(&topology) == HVD_OK ? topology.rank : -1;
}

inline std::string error_text(int rank, std::string_view operation, std::string_view reason,
                              const std::source_location& site) {
  std::string text;
  if (rank >= 0) text += "rank " + std::to_string(rank) + ": ";
  if (reason.find(operation) == std::string_view::npos) (text += operation) += ": ";  // many reasons name it themselves
  text += reason;
  text += std::string(" [") + site.file_name() + ":" + std::to_string(site.line()) + "]";
  return text;
}

/// Throws the class of `code`.
[[noreturn]] inline void raise(StatusCode code, std::string_view operation, const std::string& reason,
                               const std::source_location& site) {
  const int rank = rank_or_none();
  const std::string text = error_text(rank, operation, reason, site);
  switch (code) {
    case StatusCode::kInvalidArgument:
      throw InvalidArgument(code, rank, std::string(operation), text);
    case StatusCode::kPrecondition:
      throw PreconditionError(code, rank, std::string(operation), text);
    case StatusCode::kUnavailable:
      throw Unavailable(code, rank, std::string(operation), text);
    default:
      throw InternalError(code, rank, std::string(operation), text);
  }
}

/// Throws for a failed call of the C ABI, with the text that it left on this thread.
inline void check(int code, std::string_view operation, const std::source_location& site) {
  if (code != HVD_OK) raise(static_cast<StatusCode>(code), operation, std::string(hvd_last_error()), site);
}

}  // namespace detail
}  // namespace hvd
