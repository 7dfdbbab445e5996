#include "ops/algorithms/block_use.h"

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
    const std::optional<SharedBlocks::Reader> reader = blocks.claim();
    if (!reader) co_return Status();
    const Pending left = context_.await_left(reader->peer, reader->call);
    HVD_CO_RETURN_IF_ERROR(co_await left);
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
  for (int rank = 0; rank < context_.size(); ++rank) {
    if (rank != context_.rank())
      found_[static_cast<std::size_t>(rank)] = transport_.blocks()->find(context_.global_rank(rank), stage);
  }
  co_return Status();
}

}  // namespace hvd
