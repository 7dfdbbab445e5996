#include "ops/transport/shm/shm_connector.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <fstream>
#include <optional>
#include <utility>

#include "common/log.h"
#include "common/wire.h"
#include "ops/transport/shm/shm_link.h"

namespace hvd {
namespace {

constexpr Duration kRetryTime = std::chrono::milliseconds(2);
constexpr Duration kLongestPoll = std::chrono::seconds(1);

// Names with an abstract socket reach exactly as far as one network namespace of one running kernel.
std::string place_of_this_process() {
  std::string boot_id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot_id;
  std::array<char, 64> space{};
  const ssize_t length = ::readlink("/proc/self/ns/net", space.data(), space.size());
  return fmt::format("{} {} {}", boot_id,
                     std::string_view(space.data(), length > 0 ? static_cast<std::size_t>(length) : 0), ::geteuid());
}

// The name in an address of this host; nothing for another host or no address.
std::optional<std::string> name_in(std::span<const std::byte> address) {
  WireReader in(address);
  const std::string place = in.text();
  std::string name = in.text();
  if (!in.ok() || name.empty() || place != place_of_this_process()) return std::nullopt;
  return name;
}

std::string random_name() {
  std::string name = "horovod_cpp.";
  for (const std::byte byte : random_nonce()) name += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return name;
}

}  // namespace

Result<std::unique_ptr<ShmConnector>> ShmConnector::create(int rank, int size, std::string job_token,
                                                           std::optional<std::size_t> ring_bytes) {
  Result<std::unique_ptr<ShmWakeup>> wakeup = ShmWakeup::create(slot_bytes_for(size));
  if (!wakeup) return wakeup.status();
  std::string name = random_name();
  Result<UniqueFd> listener = listen_at(name, size);
  if (!listener) return listener.status();
  ShmSelf self;
  self.rank = rank;
  self.size = size;
  self.job_token = std::move(job_token);
  self.ring_bytes = std::bit_ceil(ring_bytes.value_or(ring_bytes_for(size)));
  self.uid = ::geteuid();
  self.process = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  self.wakeup = std::move(wakeup).value();
  self.awaited.resize(static_cast<std::size_t>(size));
  return std::unique_ptr<ShmConnector>(new ShmConnector(std::move(self), std::move(listener).value(), std::move(name)));
}

ShmConnector::ShmConnector(ShmSelf self, UniqueFd listener, std::string name)
    : self_(std::move(self)), listener_(std::move(listener)), name_(std::move(name)) {}

std::vector<std::byte> ShmConnector::address() const {
  WireWriter out;
  out.text(place_of_this_process());
  out.text(name_);
  return out.take();
}

void ShmConnector::invite(const std::vector<std::vector<std::byte>>& addresses) {
  handshakes_.reserve(2 * addresses.size());
  for (int peer = 0; peer < self_.size; ++peer) {
    const auto i = static_cast<std::size_t>(peer);
    const std::optional<std::string> name = peer == self_.rank ? std::nullopt : name_in(addresses[i]);
    if (!name) continue;
    if (peer < self_.rank) {
      handshakes_.push_back(ShmHandshake::call(self_, peer, *name));
    } else {
      self_.awaited[i] = true;
    }
  }
}

bool ShmConnector::waiting() const {
  // Who has not said which rank it is may be a stranger; the ranks that are to come are awaited as such.
  return std::any_of(handshakes_.begin(), handshakes_.end(),
                     [](const ShmHandshake& one) { return !one.ended() && one.peer() >= 0; }) ||
         std::find(self_.awaited.begin(), self_.awaited.end(), true) != self_.awaited.end();
}

void ShmConnector::accept_callers() {
  for (;;) {
    Result<UniqueFd> socket = accept_from(listener_.get());
    if (!socket || !*socket) return;
    handshakes_.push_back(ShmHandshake::answer(self_, std::move(socket).value()));
  }
}

void ShmConnector::wait(TimePoint deadline) {
  std::vector<pollfd> descriptors{{listener_.get(), POLLIN, 0}};
  bool retries = false;
  for (const ShmHandshake& one : handshakes_) {
    if (one.ended()) continue;
    if (one.retries()) retries = true;
    if (one.fd() >= 0 && !one.retries()) descriptors.push_back({one.fd(), POLLIN, 0});
  }
  const TimePoint now = SteadyClock().now();
  const Duration left = std::max(Duration::zero(), std::min(deadline - now, retries ? kRetryTime : kLongestPoll));
  const auto milliseconds = std::chrono::ceil<std::chrono::milliseconds>(left).count();
  ::poll(descriptors.data(), descriptors.size(), static_cast<int>(milliseconds));
}

ShmConnector::Shared ShmConnector::connect(const std::vector<std::vector<std::byte>>& addresses,
                                           StreamTransport::Settings settings, TimePoint deadline) {
  invite(addresses);
  for (;;) {
    accept_callers();
    for (ShmHandshake& one : handshakes_) {
      if (!one.ended()) one.advance();
    }
    if (!waiting() || SteadyClock().now() >= deadline) break;
    wait(deadline);
  }
  settings.name = "shared memory";
  settings.rank = self_.rank;
  settings.size = self_.size;
  Shared shared;
  std::vector<std::unique_ptr<ShmPeer>> reached;
  for (ShmHandshake& one : handshakes_) {
    if (!one.ended()) one.give_up("it did not answer in time");
    if (one.agreed()) {
      reached.push_back(one.take_peer());
    } else if (one.peer() >= 0) {
      log::warning("rank {} is on this host but memory is not shared with it: {}", one.peer(), one.reason());
    }
  }
  handshakes_.clear();
  listener_.reset();
  std::sort(reached.begin(), reached.end(), [](const auto& a, const auto& b) { return a->rank < b->rank; });
  self_.wakeup->close_presence_file();
  ShmWakeup& wakeup = *self_.wakeup;
  shared.transport = std::make_unique<StreamTransport>(std::move(settings), std::move(self_.wakeup));
  auto blocks = std::make_unique<SharedBlocks>(self_.rank, self_.size, slot_bytes_for(self_.size));
  blocks->add(self_.rank, wakeup.block());
  for (auto& peer : reached) {
    shared.peers.push_back(peer->rank);
    const ShmPeer& kept = wakeup.keep(std::move(peer));
    blocks->add(kept.rank, block_of(kept.presence));
    shared.transport->add_peer(kept.rank, std::make_unique<ShmLink>(self_.rank, kept));
  }
  shared.transport->share_blocks(std::move(blocks));  // the memory is the transport's, too
  return shared;
}

}  // namespace hvd
