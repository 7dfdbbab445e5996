#include "ops/transport/tcp/tcp_connector.h"

#include <fmt/format.h>

#include <set>
#include <utility>

#include "common/wire.h"
#include "ops/transport/tcp/meeting.h"
#include "ops/transport/tcp/tcp_link.h"

namespace hvd {
namespace {

Result<std::vector<SocketAddress>> read_addresses(std::span<const std::byte> blob, int rank) {
  WireReader in(blob);
  std::vector<SocketAddress> addresses;
  const std::size_t count = in.count(7);
  for (std::size_t i = 0; i < count; ++i) {
    Result<SocketAddress> address = SocketAddress::read_from(in);
    if (!address) return address.status();
    addresses.push_back(*address);
  }
  if (addresses.empty()) return Status::unavailable(fmt::format("rank {} published no address to connect to", rank));
  return addresses;
}

}  // namespace

Result<std::unique_ptr<TcpConnector>> TcpConnector::create(int rank, int size, Settings settings) {
  std::vector<SocketAddress> addresses;
  UniqueFd listener;
  if (settings.loopback_only) {
    Result<std::vector<SocketAddress>> loopback = SocketAddress::resolve("127.0.0.1", 0);
    if (!loopback) return loopback.status();
    Result<UniqueFd> listening = listen_on(loopback->front());
    if (!listening) return listening.status();
    listener = std::move(listening).value();
    addresses = std::move(loopback).value();
    addresses.resize(1);
  } else {
    Result<UniqueFd> listening = listen_everywhere();
    if (!listening) return listening.status();
    listener = std::move(listening).value();
    Result<std::vector<SocketAddress>> found = interface_addresses(settings.interfaces);
    if (!found) return found.status();
    addresses = std::move(found).value();
  }
  Result<SocketAddress> local = local_address(listener.get());
  if (!local) return local.status();
  HVD_RETURN_IF_ERROR(adopt_socket(listener.get()));
  for (SocketAddress& address : addresses) address.set_port(local->port());
  return std::unique_ptr<TcpConnector>(
      new TcpConnector(rank, size, std::move(settings), std::move(listener), std::move(addresses)));
}

TcpConnector::TcpConnector(int rank, int size, Settings settings, UniqueFd listener,
                           std::vector<SocketAddress> addresses)
    : rank_(rank),
      size_(size),
      settings_(std::move(settings)),
      listener_(std::move(listener)),
      addresses_(std::move(addresses)) {}

std::vector<std::byte> TcpConnector::address() const {
  WireWriter out;
  out.varint(addresses_.size());
  for (const SocketAddress& address : addresses_) address.write_to(out);
  return out.take();
}

Result<std::unique_ptr<StreamTransport>> TcpConnector::connect(const std::vector<std::vector<std::byte>>& addresses,
                                                               const std::vector<int>& peers,
                                                               StreamTransport::Settings settings, TimePoint deadline) {
  TcpGreeting own;
  own.purpose = TcpGreeting::Purpose::kLink;
  own.rank = rank_;
  own.size = size_;
  own.generation = settings.generation;
  own.token = settings_.job_token;
  std::set<int> expected;
  std::vector<TcpCallee> callees;
  for (const int peer : peers) {
    if (peer > rank_) {
      expected.insert(peer);
      continue;
    }
    Result<std::vector<SocketAddress>> candidates = read_addresses(addresses[static_cast<std::size_t>(peer)], peer);
    if (!candidates) return candidates.status();
    callees.push_back({peer, std::move(candidates).value()});
  }
  Result<std::map<int, MessageSocket>> met = meet(own, listener_.get(), std::move(expected), callees, deadline);
  if (!met) return Status(met.status().code(), fmt::format("connecting over TCP: {}", met.status().text()));
  listener_.reset();
  Result<std::unique_ptr<TcpWakeup>> made = TcpWakeup::create();
  if (!made) return made.status();
  TcpWakeup& wakeup = **made;
  settings.name = "TCP";
  settings.rank = rank_;
  settings.size = size_;
  auto transport = std::make_unique<StreamTransport>(std::move(settings), std::move(made).value());
  for (auto& [peer, socket] : *met) {
    Result<std::unique_ptr<TcpLink>> link = TcpLink::create(wakeup, socket.take_socket());
    if (!link) return link.status();
    transport->add_peer(peer, std::move(link).value());
  }
  return transport;
}

}  // namespace hvd
