// Connects ranks over TCP: each listens on a free port, publishes its addresses, and calls the ranks below it.
// Used at init, by the thread that calls it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ops/transport/stream_transport.h"
#include "ops/transport/tcp/socket.h"

namespace hvd {

class TcpConnector {
 public:
  struct Settings {
    std::string job_token;
    bool loopback_only = false;           ///< all ranks are on this host: nobody else can connect
    std::vector<std::string> interfaces;  ///< names; empty: all
  };

  static Result<std::unique_ptr<TcpConnector>> create(int rank, int size, Settings settings);

  /// For the other ranks.
  std::vector<std::byte> address() const;

  /// Connects with each of `peers` (ascending), of whose `addresses` (by rank) the first that answers is taken. Both
  /// sides name each other. Once; blocks until all are there, `deadline` at most: kDeadlineExceeded names the missing.
  Result<std::unique_ptr<StreamTransport>> connect(const std::vector<std::vector<std::byte>>& addresses,
                                                   const std::vector<int>& peers, StreamTransport::Settings settings,
                                                   TimePoint deadline);

 private:
  TcpConnector(int rank, int size, Settings settings, UniqueFd listener, std::vector<SocketAddress> addresses);

  int rank_;
  int size_;
  Settings settings_;
  UniqueFd listener_;
  std::vector<SocketAddress> addresses_;
};

}  // namespace hvd
