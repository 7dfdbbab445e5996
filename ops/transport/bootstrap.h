// How ranks that do not know each other yet exchange a few bytes: used at init only, by the thread that calls it.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include <horovod_cpp/status.h>

#include "common/clock.h"

namespace hvd {

class Bootstrap {
 public:
  virtual ~Bootstrap() = default;
  /// What joined the job, for messages: "mpi", "hvdrun", "torchrun", "single".
  virtual std::string_view name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Every rank hands in bytes and gets those of all, by rank. Collective; blocks until `deadline` at most.
  /// kDeadlineExceeded names the ranks that have not come; kInternal a rank that was lost.
  virtual Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine,
                                                                TimePoint deadline) = 0;
};

}  // namespace hvd
