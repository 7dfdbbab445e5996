// An ordered stream of bytes between this rank and one peer, in both directions. Everything that distinguishes
// in-process memory, shared memory and TCP is behind this interface; the protocol on top is StreamTransport.
// Runs under the Turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include <horovod_cpp/status.h>

namespace hvd {

/// How an attempt to read the memory of a peer went.
enum class Pulled : std::uint8_t {
  kAll,
  kRefused,  ///< this memory cannot be read from here; the peer has to send it
  kGone,     ///< the peer may have let go of the memory: what was read means nothing
};

class Link {
 public:
  virtual ~Link() = default;

  /// Takes as many bytes as fit without waiting; 0 when there is no room or the peer is gone.
  virtual std::size_t write_some(std::span<const std::byte> bytes) = 0;
  /// Bytes that have arrived and are contiguous in memory; empty when there are none.
  /// Element k of the stream lies at an address that is k modulo 16.
  virtual std::span<const std::byte> peek() = 0;
  /// Gives up the first `count` bytes of the last `peek`.
  virtual void consume(std::size_t count) = 0;
  /// Reads straight into `place`, past `peek`, where that saves a copy; 0 when the link has nothing better.
  virtual std::size_t read_into(std::span<std::byte> /*place*/) { return 0; }
  /// Whether both sides can read each other's memory; the same on both, and for as long as the link lives.
  virtual bool can_pull() const { return false; }
  /// Copies what lies at `address` in the memory of the peer, which has offered it, without the peer's help.
  virtual Pulled pull(std::uint64_t /*address*/, std::span<std::byte> /*place*/) { return Pulled::kRefused; }
  /// Wakes the peer if it sleeps and something was written or consumed since the last call.
  virtual void ring() = 0;
  /// Wakes the peer at the next `ring`, although nothing was written here.
  virtual void nudge() {}
  /// The peer has closed its end of the link, or its process has ended: it reads nothing of this rank any more. Also
  /// after `close`.
  virtual bool peer_has_ended() const { return false; }
  /// After the owner said that it sleeps: true when there is something to read, or room for what did not fit.
  virtual bool has_news() = 0;
  /// Why the peer is gone, once everything that it sent was read; a success while it is there.
  virtual Status failure() = 0;
  /// Gives the stream up: the peer sees that it has ended. Not to be used afterwards.
  virtual void close() = 0;
};

/// How a rank whose links are all silent is woken.
class Wakeup {
 public:
  virtual ~Wakeup() = default;
  /// Readable when a link has news; -1 where the owner is woken otherwise (in-process).
  virtual int fd() const = 0;
  /// Tells peers whether they have to ring.
  virtual void set_sleeping(bool sleeping) = 0;
  /// Takes in what the descriptor had to say: which links are readable, which peers are gone.
  virtual void refresh() = 0;
};

}  // namespace hvd
