// One call's use of the blocks of its members (ops/transport/shared_blocks.h): what this rank shows, and what it finds
// where others show it. Lives in the coroutine of an algorithm; the call is left when that ends, in whatever way.
#pragma once

#include <cstddef>
#include <vector>

#include "common/loop/task.h"
#include "ops/collective_context.h"

namespace hvd {

class BlockUse {
 public:
  /// For a context of several ranks that have slots.
  explicit BlockUse(CollectiveContext& context);
  BlockUse(const BlockUse&) = delete;
  BlockUse& operator=(const BlockUse&) = delete;
  ~BlockUse();

  /// Takes a slot for what this rank shows; waits until nobody reads what lies there. That was two uses ago, so most
  /// often nobody does. kInternal when this rank is in another such call.
  Task<Status> begin();
  /// Has `context.slot_bytes()`. What the others read of it at a stage is written before that is shown.
  std::byte* slot() { return transport_.blocks()->slot(); }
  /// `bytes`: what all the others read of it, together.
  Status show(BlockStage stage, std::size_t bytes) { return transport_.show(peers_, stage, bytes); }

  /// Waits until all the others have come to `stage`.
  Task<Status> wait_for(BlockStage stage);
  /// What a rank shows that was waited for.
  const std::byte* of(int rank) const { return found_[static_cast<std::size_t>(rank)]; }

 private:
  CollectiveContext& context_;
  Transport& transport_;
  std::vector<int> peers_;  // global ranks
  std::vector<const std::byte*> found_;
  bool entered_ = false;
};

}  // namespace hvd
