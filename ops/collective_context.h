// What one call in flight has: its members, its channel, its way to send and receive, and its end.
// All that an algorithm sees beside memory. Runs under the Turn.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "ops/activity.h"
#include "ops/host_buffers.h"
#include "ops/membership.h"
#include "ops/reduce/reducer.h"
#include "ops/transport/fabric.h"

namespace hvd {

/// Calls of a set are numbered from 0 on; with this bit, the number names one use of a standing response.
inline constexpr std::uint64_t kStandingCall = std::uint64_t{1} << 63;
/// Uses of one standing response, so that each has message numbers of its own.
inline constexpr std::uint32_t kMostStandingUses = std::uint32_t{1} << 28;
/// Their channels begin here, and those of other calls end.
inline constexpr std::uint16_t kFirstStandingChannel = 0xf000;
constexpr bool is_standing_call(std::uint64_t call) { return (call & kStandingCall) != 0; }
/// `number` is below 4096.
constexpr std::uint64_t standing_call(std::uint16_t number, std::uint32_t use) {
  return kStandingCall | std::uint64_t{number} << 32 | use;
}

/// Which operand the arriving bytes are, so that both sides of an exchange compute the same bits.
enum class OperandOrder : std::uint8_t { kOwnFirst, kIncomingFirst };

class CollectiveContext {
 public:
  struct Settings {
    std::uint16_t process_set = 0;
    std::uint64_t call = 0;  ///< number of the call within its set: names its channel
    Priority priority = 0;
    std::size_t segment_bytes = std::size_t{256} << 10;
    std::size_t pull_from_bytes = 0;         ///< see pull_if_large; 0: never
    std::shared_ptr<void> keep_alive;        ///< memory of the call; transports hold it as long as they need it
    HostBufferPool* buffers = nullptr;       ///< where `lease` takes from; nullptr: allocated each time
    ActivityListener* activities = nullptr;  ///< told what the call does, if anybody wants to know
  };

  CollectiveContext(Loop& loop, Fabric& fabric, MembershipRef membership, Settings settings);
  CollectiveContext(const CollectiveContext&) = delete;
  CollectiveContext& operator=(const CollectiveContext&) = delete;
  /// Ends whatever is still in flight.
  ~CollectiveContext();

  /// While one lives, the ranks of `context` are those of a part of its set: `rank`, `size` and every peer. What was
  /// started before goes on. This rank is in the part, and all ranks of it go by it at this place of the call.
  class Part {
   public:
    Part(CollectiveContext& context, MembershipRef part) : context_(context) { context.go_by(std::move(part)); }
    ~Part() { context_.go_by(context_.set_); }
    Part(const Part&) = delete;
    Part& operator=(const Part&) = delete;

   private:
    CollectiveContext& context_;
  };

  int rank() const { return rank_; }  ///< in the process set, or in a part of it, like every rank below
  int size() const { return membership_->size(); }
  const Membership& membership() const { return *membership_; }
  bool on_one_host() const { return membership_->on_one_host(); }
  /// Whether it was begun before this rank knew that the others begin it: see ops/algorithms/direct_allreduce.h.
  bool is_standing() const { return is_standing_call(settings_.call); }
  std::size_t segment_bytes() const { return settings_.segment_bytes; }
  ActivityListener* activities() const { return settings_.activities; }

  /// From now on, messages of a collective with so many bytes may be read from the memory of their senders where a host
  /// allows that: one copy less for the bytes, and a reply more for each message. Equal on all ranks.
  void pull_if_large(std::size_t collective_bytes);
  bool pulls() const { return pulls_; }

  /// Each ends with a Status: arrived, or cancelled, or a lost peer. Memory stays valid until then.
  Pending send(int to, std::span<const std::byte> bytes);
  Pending receive(int from, std::span<std::byte> place);
  /// Receives as many bytes as `out` has and combines each element with `own` into `out` (which may be `own`).
  Pending receive_combine(int from, std::span<std::byte> out, const std::byte* own, const Reducer& reducer,
                          OperandOrder order = OperandOrder::kOwnFirst);

  /// Whether all members find what one of them shows in its block, and how much that may be; 0: they do not. Equal on
  /// all ranks.
  std::size_t slot_bytes() const { return on_one_host() ? fabric_.slot_bytes() : 0; }
  /// The transport that has the blocks, and the number of this call there.
  Transport& block_transport() { return fabric_.data_route(global_rank(rank_ == 0 ? size() - 1 : 0)); }
  std::uint64_t block_call() const { return (settings_.call & ~kStandingCall) + 1; }
  /// Ends when `peer` has come so far in this call.
  Pending await_stage(int peer, BlockStage stage) { return await_notice(global_rank(peer), {block_call(), stage}); }
  /// Ends when a slot of this rank's block is free; `reader`, by its global number, is a rank that reads one.
  Pending await_slot(int reader) { return await_notice(reader, {block_call(), BlockStage::kSlotFree}); }
  int global_rank(int rank) const { return membership_->ranks[static_cast<std::size_t>(rank)]; }

  /// Memory of an algorithm's own that it sends from or receives into: what is started from now on holds it, like the
  /// memory of the call, until the transport has let go. A coroutine's frame may be gone before that.
  void hold(std::shared_ptr<void> memory);
  /// Such memory, of at least `bytes`, not initialised; nullptr when there is none to be had.
  std::byte* lease(std::size_t bytes);

  /// Global ranks that have yet to send what is in flight here, or to take it; ascending.
  std::vector<int> awaited() const;

  /// Ends everything in flight, and at once whatever is started later. The first reason stays.
  void cancel(const Status& reason);
  const Status& cancelled() const { return cancelled_; }

 private:
  void go_by(MembershipRef membership);
  TransferRef make(Transfer::Direction direction, int peer, std::size_t bytes);
  Pending start(TransferRef transfer);
  Pending await_notice(int global_peer, BlockNotice notice);

  Loop& loop_;
  Fabric& fabric_;
  const MembershipRef set_;
  MembershipRef membership_;  // the set's, or that of a part
  Settings settings_;
  int rank_ = 0;
  bool pulls_ = false;
  std::vector<std::uint32_t> sent_;  // messages so far, by rank in the set
  std::vector<std::uint32_t> received_;
  std::vector<TransferRef> in_flight_;  // finished ones are swept out now and then
  std::size_t sweep_at_ = 32;
  Status cancelled_;
};

}  // namespace hvd
