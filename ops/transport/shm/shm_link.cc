#include "ops/transport/shm/shm_link.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

namespace hvd {
namespace {

// The reader starts on a piece while the next one is copied in; also keeps a piece within the smallest ring.
constexpr std::size_t kPieceBytes = std::size_t{32} << 10;

std::string process_text(const ShmPeer& peer) {
  return peer.pid > 0 ? fmt::format("its process (pid {})", peer.pid) : std::string("its process");
}

}  // namespace

ShmLink::ShmLink(int rank, const ShmPeer& peer)
    : ShmLink(peer, rank < peer.rank ? peer.control().to_higher : peer.control().to_lower,
              rank < peer.rank ? peer.ring_to_higher() : peer.ring_to_lower(),
              rank < peer.rank ? peer.control().to_lower : peer.control().to_higher,
              rank < peer.rank ? peer.ring_to_lower() : peer.ring_to_higher(),
              rank < peer.rank ? peer.control().lower_closed : peer.control().higher_closed,
              rank < peer.rank ? peer.control().higher_closed : peer.control().lower_closed) {}

ShmLink::ShmLink(const ShmPeer& peer, ByteRingControl& out, std::span<std::byte> out_ring, ByteRingControl& in,
                 std::span<std::byte> in_ring, std::atomic<std::uint32_t>& closed,
                 std::atomic<std::uint32_t>& peer_closed)
    : peer_(peer),
      presence_(*reinterpret_cast<ShmPresence*>(peer.presence.bytes().data())),
      in_written_(in.written),
      closed_(closed),
      peer_closed_(peer_closed),
      writer_(out, out_ring),
      reader_(in, in_ring) {}

std::size_t ShmLink::write_some(std::span<const std::byte> bytes) {
  // A piece is never longer than the ring, so that no position that a peer may write leads out of it.
  const std::size_t longest = std::min(kPieceBytes, peer_.ring_bytes);
  std::size_t written = 0;
  while (written < bytes.size()) {
    const std::size_t wanted = std::min(longest, bytes.size() - written);
    const std::size_t count = writer_.write_some(bytes.subspan(written, wanted));
    written += count;
    if (count < wanted) break;
  }
  if (written > 0) wrote_ = true;
  return written;
}

void ShmLink::consume(std::size_t count) {
  consumed_ += count;
  reader_.consume(count);
  if (reader_.writer_is_blocked()) made_room_ = true;
}

Pulled ShmLink::pull(std::uint64_t address, std::span<std::byte> place) {
  const bool read = read_memory(peer_.pid, address, place);
  // Read and written, so that it comes after what was read.
  if (peer_closed_.fetch_or(0) != 0 || peer_.gone) return Pulled::kGone;
  return read ? Pulled::kAll : Pulled::kRefused;
}

void ShmLink::ring() {
  const bool unread = std::exchange(wrote_, false) && !writer_.all_read();
  const bool nudged = std::exchange(nudged_, false);
  if (!std::exchange(made_room_, false) && !unread && !nudged) return;
  const std::uint64_t sleep = presence_.sleeps.load();
  // Once a sleep is enough: the doorbell stays up until the peer has looked.
  if (sleep % 2 == 0 || sleep == rung_sleep_) return;
  rung_sleep_ = sleep;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(peer_.doorbell.get(), &one, sizeof one);
  presence_.rings.fetch_add(1);
}

bool ShmLink::has_news() { return !reader_.peek().empty() || (writer_.blocked() && writer_.has_room()) || peer_.gone; }

Status ShmLink::failure() {
  if (in_written_.load() - consumed_ > peer_.ring_bytes) {
    return Status::internal(
        fmt::format("{} wrote positions into the shared memory that cannot be right", process_text(peer_)));
  }
  if (!peer_.gone || !reader_.peek().empty()) return {};
  if (peer_.ended) return Status::internal(fmt::format("{} has ended", process_text(peer_)));
  return Status::internal(fmt::format("{} is ending or has closed the connection", process_text(peer_)));
}

bool ShmLink::peer_has_ended() const {
  return peer_closed_.load() != 0 || (peer_.gone && !closed_here_) || peer_.ended || is_readable(peer_.process);
}

void ShmLink::close() {
  closed_here_ = true;
  if (peer_.owner != ::getpid()) return;  // a forked child has nothing to end
  closed_.store(1);
  ::shutdown(peer_.socket.get(), SHUT_RDWR);
}

}  // namespace hvd
