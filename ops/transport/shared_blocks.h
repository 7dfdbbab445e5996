// Memory of each rank that its peers on the host read in place: what a rank writes once, all of them find there,
// without a message to each. Words say which call it belongs to, and how far that has come; no two calls have one
// number.
//
//   writer                                        readers
//   takes a slot that nobody reads, fills it      enter the call: from now on they read what belongs to it
//   shows it, rings those that sleep in the call  find it
//                                                 leave the call
// Whoever comes late finds what was shown before; nobody is woken for a call that it has not begun. A slot stays as it
// is for as long as a reader is in its call. All words are sequentially consistent: a reader that enters and then
// looks, and a writer that takes back and then looks for readers, cannot miss each other.
// Runs under the Turn, but for the words and slots themselves.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "ops/transport/transfer.h"

namespace hvd {

/// What a rank's block says to its peers; lock-free, so that it may lie in shared memory.
struct BlockWords {
  struct alignas(64) Word {
    std::atomic<std::uint64_t> value{0};
  };
  static constexpr std::size_t kSlots = 2;  // one may still be read when the next call begins

  std::array<Word, kSlots> shown;  ///< call and stage of what lies in the slot; 0: nothing
  Word reading;                    ///< the call that this rank is in; 0: none
  Word wants_slot;                 ///< not 0: it waits until others have left a call
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// Of a slot, in a job of `ranks`; a call with more takes another way. All slots together stay within 32 MiB as long as
/// each has 64 KiB.
constexpr std::size_t slot_bytes_for(int ranks) {
  constexpr std::size_t smallest = std::size_t{64} << 10;
  constexpr std::size_t largest = std::size_t{1} << 20;
  constexpr std::size_t of_all = std::size_t{32} << 20;
  return std::clamp(std::bit_floor(of_all / (BlockWords::kSlots * static_cast<std::size_t>(ranks))), smallest, largest);
}
/// A block has its words in front and the slots behind.
inline constexpr std::size_t kBlockWordsBytes = 4096;
static_assert(sizeof(BlockWords) <= kBlockWordsBytes);
constexpr std::size_t block_bytes(std::size_t slot_bytes) { return kBlockWordsBytes + BlockWords::kSlots * slot_bytes; }

class SharedBlocks {
 public:
  /// `keep_alive`: what the memory of the blocks lies in, if that is to live as long as this.
  SharedBlocks(int rank, int size, std::size_t slot_bytes, std::shared_ptr<void> keep_alive = nullptr)
      : rank_(rank),
        slot_bytes_(slot_bytes),
        keep_alive_(std::move(keep_alive)),
        blocks_(static_cast<std::size_t>(size)) {}

  /// The block of a rank, this one too: `block_bytes(slot_bytes)`, with BlockWords in front.
  void add(int rank, std::span<std::byte> memory);

  // ---- what this rank writes

  /// Begins `call`, which is not 0 and has no other number on any rank; `peers` are its other members. False when this
  /// rank is in another call.
  bool enter(std::uint64_t call, std::span<const int> peers);
  /// Takes a slot for the call. Nothing when it has one; else a rank that reads what lies in one: to be tried again
  /// when a slot is free (BlockStage::kSlotFree).
  std::optional<int> claim();
  /// The slot that it took.
  std::byte* slot() const { return slots_of(rank_) + *slot_ * slot_bytes_; }
  void show(BlockStage stage);
  /// What others show of the call is not read any more.
  void leave();

  // ---- what it reads

  /// Where `peer` has what it shows of the call of this rank, once it has come to `stage`; nullptr before.
  const std::byte* find(int peer, BlockStage stage) const;
  /// Whether `peer` is in the call of this rank, so that it may sleep in it.
  bool is_in_call(int peer) const { return words(peer).reading.value.load() == call_; }
  bool wants_slot(int peer) const { return words(peer).wants_slot.value.load() != 0; }
  /// Whether it may sleep where what this rank shows, or has left, is what it waits for.
  bool may_wait_for_this(int peer) const;

  // ---- waiting, for transports

  /// Ends `transfer` when what its notice says has come about.
  void await(const TransferRef& transfer);
  /// Ends what has come about. True when there was any.
  bool deliver();
  bool has_news() const;
  void cancel(const TransferRef& transfer);
  /// Everything that waits for what `peer` is to show.
  void end(int peer, const Status& status);
  /// It reads nothing any more, whatever its words say.
  void gone(int peer);
  bool waits_for_slot() const { return wants_slot_; }

 private:
  struct Block {
    BlockWords* words = nullptr;
    std::byte* slots = nullptr;
    bool gone = false;
  };
  struct Slot {
    std::uint64_t call = 0;
    std::vector<int> readers;
  };

  Block& block(int rank) { return blocks_[static_cast<std::size_t>(rank)]; }
  const Block& block(int rank) const { return blocks_[static_cast<std::size_t>(rank)]; }
  BlockWords& words(int rank) const { return *block(rank).words; }
  std::byte* slots_of(int rank) const { return block(rank).slots; }
  bool reads(int peer, std::uint64_t call) const {
    return !block(peer).gone && words(peer).reading.value.load() == call;
  }
  void want_slot(bool wants);
  std::optional<int> reader_of(const Slot& slot) const;
  bool has_free_slot() const;
  const std::byte* find(int peer, std::uint64_t call, BlockStage stage) const;
  bool has_come(const Transfer& transfer) const;

  int rank_;
  std::size_t slot_bytes_;
  std::shared_ptr<void> keep_alive_;
  std::vector<Block> blocks_;  // by rank; without words: a rank that shares none
  std::array<Slot, BlockWords::kSlots> own_;
  std::uint64_t call_ = 0;
  std::vector<int> peers_;
  std::optional<std::size_t> slot_;
  bool wants_slot_ = false;
  std::vector<TransferRef> awaited_;
};

}  // namespace hvd
