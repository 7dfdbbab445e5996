#include "ops/algorithms/block_use.h"

#include <fmt/format.h>

namespace hvd {

BlockUse::BlockUse(CollectiveContext& context)
    : context_(context), transport_(context.block_transport()), found_(static_cast<std::size_t>(context.size())) {
  for (int rank = 0; rank < context.size(); ++rank) {
    if (rank != context.rank()) peers_.push_back(context.global_rank(rank));
  }
}

BlockUse::~BlockUse() {
  if (entered_) transport_.leave_block(peers_);
}

Task<Status> BlockUse::begin() {
  SharedBlocks& blocks = *transport_.blocks();
  entered_ = blocks.enter(context_.block_call(), peers_);
  if (!entered_) co_return Status::internal("another call of this rank uses its block");
  for (;;) {
    const std::optional<int> reader = blocks.claim();
    if (!reader) co_return Status();
    const Pending free = context_.await_slot(*reader);
    HVD_CO_RETURN_IF_ERROR(co_await free);
  }
}

Task<Status> BlockUse::wait_for(BlockStage stage) {
  std::vector<Pending> missing;
  for (int rank = 0; rank < context_.size(); ++rank) {
    if (rank == context_.rank()) continue;
    const std::byte*& place = found_[static_cast<std::size_t>(rank)];
    place = transport_.look_for(context_.global_rank(rank), stage);
    if (place == nullptr) missing.push_back(context_.await_stage(rank, stage));
  }
  if (missing.empty()) co_return Status();
  for (Pending& one : missing) HVD_CO_RETURN_IF_ERROR(co_await one);
  HVD_CO_RETURN_IF_ERROR(context_.cancelled());  // since then a peer may have been lost, which then reuses its slot
  for (int rank = 0; rank < context_.size(); ++rank) {
    const int peer = context_.global_rank(rank);
    if (rank == context_.rank()) continue;
    const std::byte* const place = transport_.blocks()->find(peer, stage);
    if (place == nullptr) co_return Status::internal(fmt::format("rank {} shows its part of the call no more", peer));
    found_[static_cast<std::size_t>(rank)] = place;
  }
  co_return Status();
}

}  // namespace hvd
