// The stream of bytes between two ranks of one host: a ring in shared memory for each direction.
// Runs under the Turn; nothing here waits, and only `ring` makes a system call, to wake a peer that sleeps.
#pragma once

#include "ops/transport/byte_ring.h"
#include "ops/transport/link.h"
#include "ops/transport/shm/shm_peer.h"

namespace hvd {

class ShmLink final : public Link {
 public:
  /// `peer` must outlive the link.
  ShmLink(int rank, const ShmPeer& peer);

  std::size_t write_some(std::span<const std::byte> bytes) override;
  std::span<const std::byte> peek() override { return reader_.peek(); }
  void consume(std::size_t count) override;
  bool can_pull() const override { return peer_.can_pull; }
  Pulled pull(std::uint64_t address, std::span<std::byte> place) override;
  void ring() override;
  void nudge() override { nudged_ = true; }
  bool peer_has_ended() const override;
  bool has_news() override;
  Status failure() override;
  void close() override;

 private:
  ShmLink(const ShmPeer& peer, ByteRingControl& out, std::span<std::byte> out_ring, ByteRingControl& in,
          std::span<std::byte> in_ring, std::atomic<std::uint32_t>& closed, std::atomic<std::uint32_t>& peer_closed);

  const ShmPeer& peer_;
  ShmPresence& presence_;  // the peer's
  const std::atomic<std::uint64_t>& in_written_;
  std::atomic<std::uint32_t>& closed_;
  std::atomic<std::uint32_t>& peer_closed_;
  ByteRingWriter writer_;
  ByteRingReader reader_;
  std::uint64_t consumed_ = 0;
  std::uint64_t rung_sleep_ = 0;  // the sleep that this link has ended already
  bool closed_here_ = false;      // which ends the socket for both
  bool wrote_ = false;            // since the last ring
  bool nudged_ = false;
  bool made_room_ = false;  // for a writer that found none
};

}  // namespace hvd
