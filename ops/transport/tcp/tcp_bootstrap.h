// A rendezvous without MPI: rank 0 listens, the others find it, and bytes are exchanged through it. Guarded by the
// token of the job. Used at init, by the thread that calls it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ops/transport/bootstrap.h"
#include "ops/transport/tcp/message_socket.h"

namespace hvd {

class TcpBootstrap final : public Bootstrap {
 public:
  /// From hvdrun: rank 0 inherits a listening socket, whose address the others know.
  struct FromLauncher {
    int rank = 0;
    int size = 1;
    std::string address;
    std::uint16_t port = 0;
    std::string token;
    int listen_fd = -1;  ///< rank 0
  };
  /// From torchrun: the launcher itself listens at the master port, which is never bound here. Rank 0 takes the first
  /// free port of the 16 after it, and the others look for it there.
  struct FromTorchrun {
    int rank = 0;
    int size = 1;
    std::string master_address;
    std::uint16_t master_port = 0;
    std::string token;  ///< tells jobs and restarts apart
  };

  static Result<std::unique_ptr<TcpBootstrap>> create(const FromLauncher& from);
  static Result<std::unique_ptr<TcpBootstrap>> create(const FromTorchrun& from);

  std::string_view name() const override { return name_; }
  int rank() const override { return own_.rank; }
  int size() const override { return own_.size; }
  Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine, TimePoint deadline) override;

 private:
  TcpBootstrap(std::string name, TcpGreeting own) : name_(std::move(name)), own_(std::move(own)) {}

  Status meet_others(TimePoint deadline);
  Status collect(std::vector<std::vector<std::byte>>& all, TimePoint deadline);
  Status flush(TimePoint deadline);

  std::string name_;
  TcpGreeting own_;
  UniqueFd listener_;                      // rank 0
  std::vector<SocketAddress> candidates_;  // the others: where rank 0 may be
  std::map<int, MessageSocket> connections_;
};

/// A job of one rank.
class SingleBootstrap final : public Bootstrap {
 public:
  std::string_view name() const override { return "single"; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine,
                                                        TimePoint /*deadline*/) override {
    return std::vector<std::vector<std::byte>>{{mine.begin(), mine.end()}};
  }
};

}  // namespace hvd
