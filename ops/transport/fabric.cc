#include "ops/transport/fabric.h"

#include <algorithm>

namespace hvd {

Transport& Fabric::add(std::unique_ptr<Transport> transport) {
  transports_.push_back(std::move(transport));
  return *transports_.back();
}

void Fabric::set_events(TransportEvents& events) {
  for (const auto& transport : transports_) transport->set_events(events);
}

void Fabric::set_fault_hook(FaultHook* fault) {
  for (const auto& transport : transports_) transport->set_fault_hook(fault);
}

Status Fabric::watch_with(Poller& poller) {
  for (const auto& transport : transports_) {
    if (transport->wake_fd() >= 0) HVD_RETURN_IF_ERROR(poller.watch(transport->wake_fd()));
  }
  return {};
}

void Fabric::unwatch(Poller& poller) {
  for (const auto& transport : transports_) {
    if (transport->wake_fd() >= 0) poller.unwatch(transport->wake_fd());
  }
}

bool Fabric::progress() {
  bool moved = false;
  for (const auto& transport : transports_) {
    if (transport->progress()) moved = true;
  }
  return moved;
}

void Fabric::hold_bells() {
  for (const auto& transport : transports_) transport->hold_bells();
}

void Fabric::ring() {
  for (const auto& transport : transports_) transport->ring();
}

bool Fabric::arm() {
  bool silent = true;
  for (const auto& transport : transports_) {
    if (!transport->arm()) silent = false;
  }
  return silent;
}

void Fabric::disarm() {
  for (const auto& transport : transports_) transport->disarm();
}

bool Fabric::needs_polling() const {
  return std::any_of(transports_.begin(), transports_.end(), [](const auto& t) { return t->needs_polling(); });
}

TimePoint Fabric::next_deadline() const {
  TimePoint next = kNever;
  for (const auto& transport : transports_) next = std::min(next, transport->next_deadline());
  return next;
}

bool Fabric::needs_no_core() const {
  return std::any_of(transports_.begin(), transports_.end(), [](const auto& t) { return t->needs_no_core(); });
}

void Fabric::say_goodbye() {
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank_) control(peer).say_goodbye(peer);
  }
}

bool Fabric::flushed() const {
  return std::all_of(transports_.begin(), transports_.end(), [](const auto& t) { return t->flushed(); });
}

TransportStatistics Fabric::statistics() const {
  TransportStatistics sum;
  for (const auto& transport : transports_) {
    const TransportStatistics& one = transport->statistics();
    sum.control_messages_sent.add(one.control_messages_sent.value());
    sum.control_bytes_sent.add(one.control_bytes_sent.value());
    sum.data_bytes_sent.add(one.data_bytes_sent.value());
    sum.data_bytes_pulled.add(one.data_bytes_pulled.value());
  }
  return sum;
}

}  // namespace hvd
