// One message of a collective on its way: what a send or a receive is until it has ended.
// Lives under the Turn of its rank.
#pragma once

#include <compare>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include <horovod_cpp/status.h>

#include "common/loop/loop.h"

namespace hvd {

/// Names a message between two ranks: the n-th of a channel, in one direction. A channel belongs to one call in
/// flight, so calls never share a sequence.
struct TransferKey {
  std::uint16_t process_set = 0;
  std::uint16_t channel = 0;
  std::uint32_t sequence = 0;
  auto operator<=>(const TransferKey&) const = default;
};

/// How far a call has come on a rank, as its block shows (ops/transport/shared_blocks.h).
enum class BlockStage : std::uint8_t {
  kOperand = 1,
  kSum = 2,
  kSlotFree = 3,  ///< of this rank's own: nobody reads what one of its slots holds; not shown
};

/// What a transfer waits for that moves no bytes.
struct BlockNotice {
  std::uint64_t call = 0;
  BlockStage stage = BlockStage::kOperand;
};

/// What happens to bytes that arrive: copied to `out`, or combined with `own` into `out`.
struct Arrival {
  using Combine = void (*)(void* out, const void* lhs, const void* rhs, std::size_t count);

  std::byte* out = nullptr;
  const std::byte* own = nullptr;  // the other operand; may be `out`
  Combine combine = nullptr;       // nullptr: copy
  std::size_t element_bytes = 1;
  bool incoming_first = false;  // operand order, so that both sides of an exchange get equal bits
};

class Transfer {
 public:
  enum class Direction : std::uint8_t { kSend, kReceive };

  Transfer(Loop& loop, Priority priority) : loop_(loop), priority_(priority) {}

  Direction direction = Direction::kSend;
  int peer = -1;  ///< global rank
  TransferKey key;
  std::size_t bytes = 0;
  std::optional<BlockNotice> notice;  ///< receive, of no bytes: it ends when the peer has come so far
  bool may_be_pulled = false;         ///< the receiver may read the sender's memory; equal at both ends
  const std::byte* data = nullptr;    ///< send: what to send
  Arrival arrival;                    ///< receive: where to
  std::shared_ptr<void> keep_alive;   ///< held until the transport has let go of the memory

  bool done() const { return done_; }
  const Status& status() const { return status_; }

  /// Ends the transfer once; its waiter becomes ready. Later calls do nothing.
  void complete(Status status) {
    if (done_) return;
    done_ = true;
    status_ = std::move(status);
    if (waiter_) loop_.make_ready(std::exchange(waiter_, nullptr), priority_);
  }

  /// Hands over the next bytes that arrived, in order. Pieces may cut elements anywhere.
  void deliver(std::span<const std::byte> piece);
  std::size_t delivered() const { return delivered_; }
  /// `count` bytes were read straight into place.
  void skip(std::size_t count) { delivered_ += count; }

  /// One coroutine at a time.
  void set_waiter(std::coroutine_handle<> waiter) { waiter_ = waiter; }

 private:
  void combine(const std::byte* incoming, std::size_t count);

  Loop& loop_;
  Priority priority_;
  bool done_ = false;
  Status status_;
  std::coroutine_handle<> waiter_;
  std::size_t delivered_ = 0;
  std::byte carry_[16];  // the start of an element whose rest has not arrived
  std::size_t carried_ = 0;
};

using TransferRef = std::shared_ptr<Transfer>;

/// A transfer that a coroutine may await: ends with the transfer's status.
class [[nodiscard]] Pending {
 public:
  Pending() = default;
  explicit Pending(TransferRef transfer) : transfer_(std::move(transfer)) {}

  /// Whether it has ended; a send then needs its memory no more.
  bool done() const { return transfer_->done(); }

  bool await_ready() const { return transfer_->done(); }
  void await_suspend(std::coroutine_handle<> waiter) const { transfer_->set_waiter(waiter); }
  Status await_resume() const { return transfer_->status(); }

 private:
  TransferRef transfer_;
};

}  // namespace hvd
