// All transports of one rank, and which of them reaches which peer: control messages and bulk data may take
// different ways. Runs under the Turn.
#pragma once

#include <memory>
#include <vector>

#include "common/loop/poller.h"
#include "ops/transport/transport.h"

namespace hvd {

class Fabric {
 public:
  Fabric(int rank, int size) : rank_(rank), routes_(static_cast<std::size_t>(size)) {}

  /// Takes a transport over; routes are set afterwards.
  Transport& add(std::unique_ptr<Transport> transport);
  void route_control(int peer, Transport& transport) { routes_[static_cast<std::size_t>(peer)].control = &transport; }
  void route_data(int peer, Transport& transport) { routes_[static_cast<std::size_t>(peer)].data = &transport; }

  /// All pairs of ranks with one host number have blocks at the transport of their data, with slots of so many bytes
  /// (ops/transport/shared_blocks.h). The same on all ranks; 0: not so.
  void share_blocks(std::size_t slot_bytes) { slot_bytes_ = slot_bytes; }
  std::size_t slot_bytes() const { return slot_bytes_; }

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(routes_.size()); }

  void set_events(TransportEvents& events);
  void set_fault_hook(FaultHook* fault);
  /// Lets the poller watch what can wake this rank.
  Status watch_with(Poller& poller);
  void unwatch(Poller& poller);

  void post(int peer, std::vector<std::byte> message) { control(peer).post(peer, std::move(message)); }
  void start(const TransferRef& transfer) { data_route(transfer->peer).start(transfer); }
  /// As Transport::give_up, on the way of control messages; a peer that lives then loses this rank.
  void give_up(int peer, const Status& reason) { control(peer).give_up(peer, reason); }
  void cancel(const TransferRef& transfer, const Status& status) {
    data_route(transfer->peer).cancel(transfer, status);
  }

  bool progress();
  void hold_bells();
  void ring();
  /// As Transport::arm; on false the caller goes on as if awake.
  bool arm();
  void disarm();
  bool needs_polling() const;
  TimePoint next_deadline() const;
  bool needs_no_core() const;
  void say_goodbye();
  bool flushed() const;

  TransportStatistics statistics() const;
  /// The transport that carries bulk data to `peer`, for messages, tests and transports before it.
  const Transport& data_route(int peer) const { return *routes_[static_cast<std::size_t>(peer)].data; }
  Transport& data_route(int peer) { return *routes_[static_cast<std::size_t>(peer)].data; }

 private:
  struct Route {
    Transport* control = nullptr;
    Transport* data = nullptr;
  };
  Transport& control(int peer) { return *routes_[static_cast<std::size_t>(peer)].control; }

  int rank_;
  std::size_t slot_bytes_ = 0;
  std::vector<Route> routes_;
  std::vector<std::unique_ptr<Transport>> transports_;
};

}  // namespace hvd
