// A network that is slower than this machine's memory: holds this rank's bulk data back by a token bucket and then
// gives it to the transport that carries it. Control messages do not come by. For tests and benchmarks: a fabric has
// one only where HOROVOD_FAULT asks for it. Runs under the Turn.
#pragma once

#include <cstdint>
#include <deque>

#include "common/clock.h"
#include "ops/transport/fabric.h"

namespace hvd {

/// When bytes are through a pipe that takes so many a second. What it does not use is not saved for later.
class TokenBucket {
 public:
  /// At least 1.
  explicit TokenBucket(std::uint64_t bytes_per_second) : bytes_per_second_(bytes_per_second) {}

  /// Takes a token for each byte, behind whoever was there before; returns when it has the last one.
  TimePoint take(std::size_t bytes, TimePoint now);

 private:
  std::uint64_t bytes_per_second_;
  TimePoint free_at_{};
};

class SlowTransport final : public Transport {
 public:
  /// `ways`: what carries data to each peer, by rank; nullptr for this one. They outlive this transport.
  SlowTransport(std::vector<Transport*> ways, const Clock& clock, std::uint64_t bytes_per_second)
      : ways_(std::move(ways)), clock_(clock), bucket_(bytes_per_second) {}

  std::string_view name() const override { return "slowed"; }
  void cancel(const TransferRef& transfer, const Status& status) override;
  bool progress() override;
  bool arm() override { return next_deadline() > clock_.now(); }
  void disarm() override {}
  int wake_fd() const override { return -1; }
  TimePoint next_deadline() const override { return held_.empty() ? kNever : held_.front().due; }
  bool needs_no_core() const override { return true; }
  void say_goodbye(int peer) override { way(peer).say_goodbye(peer); }
  bool flushed() const override { return held_.empty(); }

 protected:
  void do_post(int peer, std::vector<std::byte> message, std::uint32_t crc) override;
  void do_start(const TransferRef& transfer) override;

 private:
  struct Held {
    TimePoint due;
    TransferRef transfer;
  };

  Transport& way(int peer) { return *ways_[static_cast<std::size_t>(peer)]; }

  std::vector<Transport*> ways_;
  const Clock& clock_;
  TokenBucket bucket_;
  std::deque<Held> held_;  // sends, earliest first
};

/// From now on `fabric` sends at most so many bytes of data a second, to all peers together. Before its first transfer.
void slow_down(Fabric& fabric, const Clock& clock, std::uint64_t bytes_per_second);

}  // namespace hvd
