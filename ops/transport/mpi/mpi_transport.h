// Bulk data over MPI: pairs the transfers of this rank with the announcements of its peers.
// Runs under the Turn.
//
// Why a transfer is announced: an MPI message is found by its tag alone, and a tag is too short for process set,
// channel and sequence, let alone for telling a transfer from the rest of one that was cancelled or from one of an
// earlier init. So a small message names the transfer in full and either carries its bytes or says under which tag they
// come; no two transfers to a peer have the same tag while a message of one may be on its way. A receive is posted when
// its announcement is there, so MPI puts (or we combine) the bytes into place with no copy of a large transfer in
// between.
//
// MPI tells nothing about lost peers and cannot take back a send. The control transport sees the loss, and the owner
// cancels its transfers; what MPI may still touch is kept alive by the endpoint, for ever if need be.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "ops/transport/mpi/mpi_endpoint.h"
#include "ops/transport/mpi/mpi_limits.h"
#include "ops/transport/transport.h"

namespace hvd {

class MpiTransport final : public Transport, private MpiEndpoint::Receiver {
 public:
  /// `life` is opened here and closed by the destructor; the endpoint outlives the transport.
  MpiTransport(MpiEndpoint& endpoint, MpiLife life, MpiLimits limits);
  /// Never waits. Transfers that have not ended are not touched any more; their memory may stay with MPI.
  ~MpiTransport() override;

  std::string_view name() const override { return "mpi"; }
  void cancel(const TransferRef& transfer, const Status& status) override;
  bool progress() override { return endpoint_.progress(); }
  /// False while something is in flight: MPI cannot wake a sleeper.
  bool arm() override { return !needs_polling(); }
  void disarm() override {}
  int wake_fd() const override { return -1; }
  bool needs_polling() const override;
  /// Nothing: farewells go over the control transport.
  void say_goodbye(int /*peer*/) override {}
  bool flushed() const override;

 protected:
  /// A bug of the caller: control messages must wake their receiver.
  void do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) override;
  void do_start(const TransferRef& transfer) override;

 private:
  using Name = std::pair<int, TransferKey>;  // of a transfer: peer and key
  struct Announced {
    MpiAnnouncement announcement;
    std::vector<std::byte> payload;
  };

  void on_announcement(const MpiAnnouncement& announcement, std::span<const std::byte> payload) override;
  void on_failure(const Status& status) override;
  void start_send(const TransferRef& transfer);
  void start_receive(const TransferRef& transfer);
  void fill(const TransferRef& transfer, const MpiAnnouncement& announcement, std::span<const std::byte> payload);
  void drop(const MpiAnnouncement& announcement);

  MpiEndpoint& endpoint_;
  MpiLife life_;
  MpiLimits limits_;
  std::map<Name, TransferRef> receives_;  // not announced yet
  std::map<Name, Announced> announced_;   // not asked for yet
  std::set<Name> abandoned_;              // receives that were cancelled before they were announced
  Status failed_;
};

}  // namespace hvd
