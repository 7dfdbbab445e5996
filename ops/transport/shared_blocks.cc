#include "ops/transport/shared_blocks.h"

#include <algorithm>

#include "common/check.h"

namespace hvd {
namespace {

constexpr int kStageBits = 2;

std::uint64_t word_of(std::uint64_t call, BlockStage stage) {
  return call << kStageBits | static_cast<std::uint64_t>(stage);
}

}  // namespace

void SharedBlocks::add(int rank, std::span<std::byte> memory) {
  HVD_CHECK(memory.size() == block_bytes(slot_bytes_));
  block(rank) = {reinterpret_cast<BlockWords*>(memory.data()), memory.data() + kBlockWordsBytes, false};
}

bool SharedBlocks::enter(std::uint64_t call, std::span<const int> peers) {
  if (call_ != 0) return false;
  call_ = call;
  peers_.assign(peers.begin(), peers.end());
  words(rank_).reading.value.store(call);
  return true;
}

std::optional<int> SharedBlocks::claim() {
  std::optional<int> blocker;
  for (std::size_t i = 0; i < own_.size(); ++i) {
    Slot& slot = own_[i];
    std::optional<int> reader = reader_of(slot);
    if (!reader && slot.call != 0) {
      words(rank_).shown[i].value.store(0);
      reader = reader_of(slot);  // one that entered meanwhile may have found it
    }
    if (!reader) {
      slot.call = call_;
      slot.readers = peers_;
      slot_ = i;
      want_slot(false);
      return std::nullopt;
    }
    blocker = reader;
  }
  return blocker;
}

void SharedBlocks::show(BlockStage stage) {
  HVD_CHECK(stage != BlockStage::kSlotFree);
  words(rank_).shown[*slot_].value.store(word_of(call_, stage));
}

void SharedBlocks::leave() {
  call_ = 0;
  slot_.reset();
  want_slot(false);
  words(rank_).reading.value.store(0);
}

void SharedBlocks::want_slot(bool wants) {
  if (wants == wants_slot_) return;
  wants_slot_ = wants;
  words(rank_).wants_slot.value.store(wants ? 1 : 0);
}

std::optional<int> SharedBlocks::reader_of(const Slot& slot) const {
  const auto found =
      std::find_if(slot.readers.begin(), slot.readers.end(), [&](int peer) { return reads(peer, slot.call); });
  return found == slot.readers.end() ? std::nullopt : std::optional(*found);
}

bool SharedBlocks::has_free_slot() const {
  return std::any_of(own_.begin(), own_.end(), [&](const Slot& slot) { return !reader_of(slot).has_value(); });
}

const std::byte* SharedBlocks::find(int peer, BlockStage stage) const { return find(peer, call_, stage); }

const std::byte* SharedBlocks::find(int peer, std::uint64_t call, BlockStage stage) const {
  for (std::size_t i = 0; i < BlockWords::kSlots; ++i) {
    const std::uint64_t shown = words(peer).shown[i].value.load();
    if (shown >> kStageBits == call && shown >= word_of(call, stage)) return slots_of(peer) + i * slot_bytes_;
  }
  return nullptr;
}

bool SharedBlocks::may_wait_for_this(int peer) const {
  const std::uint64_t reading = words(peer).reading.value.load();
  return wants_slot(peer) ||
         std::any_of(own_.begin(), own_.end(), [&](const Slot& slot) { return reading != 0 && slot.call == reading; });
}

// ---- waiting --------------------------------------------------------------------------------------------------------

bool SharedBlocks::has_come(const Transfer& transfer) const {
  const BlockNotice& notice = *transfer.notice;
  if (notice.stage == BlockStage::kSlotFree) return has_free_slot();
  return find(transfer.peer, notice.call, notice.stage) != nullptr;
}

void SharedBlocks::await(const TransferRef& transfer) {
  if (transfer->notice->stage == BlockStage::kSlotFree) want_slot(true);
  if (has_come(*transfer)) {
    transfer->complete({});
    return;
  }
  awaited_.push_back(transfer);
}

bool SharedBlocks::deliver() {
  if (awaited_.empty()) return false;
  const auto come = std::erase_if(awaited_, [&](const TransferRef& transfer) {
    if (!has_come(*transfer)) return false;
    transfer->complete({});
    return true;
  });
  return come > 0;
}

bool SharedBlocks::has_news() const {
  return std::any_of(awaited_.begin(), awaited_.end(), [&](const TransferRef& one) { return has_come(*one); });
}

void SharedBlocks::cancel(const TransferRef& transfer) { std::erase(awaited_, transfer); }

void SharedBlocks::end(int peer, const Status& status) {
  std::erase_if(awaited_, [&](const TransferRef& transfer) {
    if (transfer->peer != peer || transfer->notice->stage == BlockStage::kSlotFree) return false;
    transfer->complete(status);
    return true;
  });
}

void SharedBlocks::gone(int peer) { block(peer).gone = true; }

}  // namespace hvd
