#include "ops/transport/tcp/tcp_bootstrap.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <utility>

#include <fcntl.h>

#include "common/rank_text.h"
#include "common/wire.h"
#include "ops/transport/tcp/meeting.h"

namespace hvd {
namespace {

constexpr int kPortsTried = 16;
constexpr Duration kLongestPoll = std::chrono::seconds(1);

TcpGreeting greeting(int rank, int size, const std::string& token) {
  TcpGreeting own;
  own.purpose = TcpGreeting::Purpose::kRendezvous;
  own.rank = rank;
  own.size = size;
  own.token = token;
  return own;
}

std::vector<std::byte> pack(const std::vector<std::vector<std::byte>>& all) {
  WireWriter out;
  for (const std::vector<std::byte>& one : all) {
    out.text({reinterpret_cast<const char*>(one.data()), one.size()});
  }
  return out.take();
}

Result<std::vector<std::vector<std::byte>>> unpack(std::span<const std::byte> bytes, int size) {
  WireReader in(bytes);
  std::vector<std::vector<std::byte>> all;
  for (int rank = 0; rank < size; ++rank) {
    const std::string one = in.text();
    const auto* first = reinterpret_cast<const std::byte*>(one.data());
    all.emplace_back(first, first + one.size());
  }
  if (!in.ok() || !in.at_end()) return Status::internal("rank 0 sent a rendezvous answer that cannot be read");
  return all;
}

}  // namespace

Result<std::unique_ptr<TcpBootstrap>> TcpBootstrap::create(const FromLauncher& from) {
  std::unique_ptr<TcpBootstrap> made(new TcpBootstrap("hvdrun", greeting(from.rank, from.size, from.token)));
  if (from.rank == 0 && from.size > 1) {
    // A copy: the launcher's descriptor stays open for a later init in this process.
    made->listener_ = UniqueFd(::fcntl(from.listen_fd, F_DUPFD_CLOEXEC, 0));
    if (!made->listener_) {
      return Status::invalid_argument(fmt::format(
          "HOROVOD_RENDEZVOUS_FD={} is not an open descriptor: start rank 0 with hvdrun, which passes it on",
          from.listen_fd));
    }
    HVD_RETURN_IF_ERROR(adopt_socket(made->listener_.get()));
  } else if (from.rank != 0) {
    Result<std::vector<SocketAddress>> found = SocketAddress::resolve(from.address, from.port);
    if (!found) return found.status();
    made->candidates_ = std::move(found).value();
  }
  return made;
}

Result<std::unique_ptr<TcpBootstrap>> TcpBootstrap::create(const FromTorchrun& from) {
  std::unique_ptr<TcpBootstrap> made(new TcpBootstrap("torchrun", greeting(from.rank, from.size, from.token)));
  Result<std::vector<SocketAddress>> found = SocketAddress::resolve(from.master_address, 0);
  if (!found) return found.status();
  Status last;
  for (int i = 1; i <= kPortsTried && from.master_port + i <= 0xffff; ++i) {
    for (SocketAddress address : *found) {
      address.set_port(static_cast<std::uint16_t>(from.master_port + i));
      if (from.rank != 0) {
        made->candidates_.push_back(address);
        continue;
      }
      Result<UniqueFd> listening = listen_on(address);
      if (!listening) {
        last = listening.status();
        continue;
      }
      made->listener_ = std::move(listening).value();
      HVD_RETURN_IF_ERROR(adopt_socket(made->listener_.get()));
      return made;
    }
  }
  if (from.rank == 0 && from.size > 1) {
    return Status::unavailable(fmt::format("none of the {} ports after MASTER_PORT={} is free: {}", kPortsTried,
                                           from.master_port, last.text()));
  }
  return made;
}

Status TcpBootstrap::meet_others(TimePoint deadline) {
  if (!connections_.empty() || size() == 1) return {};
  std::set<int> expected;
  std::vector<TcpCallee> callees;
  if (rank() == 0) {
    for (int other = 1; other < size(); ++other) expected.insert(other);
  } else {
    callees.push_back({0, candidates_});
  }
  Result<std::map<int, MessageSocket>> met =
      meet(own_, rank() == 0 ? listener_.get() : -1, std::move(expected), callees, deadline);
  if (!met) return met.status();
  listener_.reset();  // a call for the next job of these processes must not land in the queue of this one
  for (auto& [other, socket] : *met) connections_.emplace(other, MessageSocket(socket.take_socket()));
  return {};
}

// Takes one message from each connection into its place.
Status TcpBootstrap::collect(std::vector<std::vector<std::byte>>& all, TimePoint deadline) {
  std::set<int> missing;
  for (const auto& [other, socket] : connections_) missing.insert(other);
  while (!missing.empty()) {
    PollSet poll;
    for (auto& [other, socket] : connections_) {
      if (!missing.contains(other)) continue;
      if (const Status moved = socket.advance(); !moved.ok()) {
        return Status::internal(fmt::format("rank {} was lost while the ranks met: {}", other, moved.text()));
      }
      if (std::optional<std::vector<std::byte>> message = socket.take()) {
        all[static_cast<std::size_t>(other)] = std::move(*message);
        missing.erase(other);
      } else {
        poll.add(socket.fd(), socket.wanted());
      }
    }
    if (missing.empty()) break;
    const TimePoint now = SteadyClock().now();
    if (now >= deadline) {
      const std::vector<int> ranks(missing.begin(), missing.end());
      return Status::deadline_exceeded(fmt::format("{} did not answer in time", rank_text(ranks)));
    }
    poll.wait(std::min(deadline, now + kLongestPoll));
  }
  return {};
}

Status TcpBootstrap::flush(TimePoint deadline) {
  for (auto& [other, socket] : connections_) {
    for (;;) {
      if (const Status moved = socket.advance(); !moved.ok() && !socket.flushed()) {
        return Status::internal(fmt::format("rank {} was lost while the ranks met: {}", other, moved.text()));
      }
      if (socket.flushed()) break;
      const TimePoint now = SteadyClock().now();
      if (now >= deadline) return Status::deadline_exceeded(fmt::format("rank {} does not read", other));
      PollSet poll;
      poll.add(socket.fd(), POLLOUT);
      poll.wait(std::min(deadline, now + kLongestPoll));
    }
  }
  return {};
}

Result<std::vector<std::vector<std::byte>>> TcpBootstrap::allgather(std::span<const std::byte> mine,
                                                                    TimePoint deadline) {
  HVD_RETURN_IF_ERROR(meet_others(deadline));
  std::vector<std::vector<std::byte>> all(static_cast<std::size_t>(size()));
  if (rank() != 0) {
    connections_.at(0).queue(mine);
    HVD_RETURN_IF_ERROR(collect(all, deadline));
    return unpack(all.front(), size());
  }
  HVD_RETURN_IF_ERROR(collect(all, deadline));
  all.front().assign(mine.begin(), mine.end());
  const std::vector<std::byte> answer = pack(all);
  for (auto& [other, socket] : connections_) socket.queue(answer);
  HVD_RETURN_IF_ERROR(flush(deadline));
  return all;
}

}  // namespace hvd
