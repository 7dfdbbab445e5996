// What algorithms work on: memory, and where its chunks begin.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "common/loop/task.h"
#include "ops/collective_context.h"
#include "ops/reduce/reducer.h"

namespace hvd {

/// The operand and the result of a reduction. `input` may be `output`; otherwise they do not overlap.
/// `chunks` has size+1 byte offsets. In a fused buffer, chunk c is the c-th slice of each tensor in it, so the order
/// in which an element is summed depends on its own tensor alone.
struct ReduceBuffer {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t bytes = 0;
  std::vector<std::size_t> chunks;
};

/// The blocks of all ranks, one behind the other in `output`; `blocks` has size+1 byte offsets. The caller's own
/// block is in `input`.
struct GatherBuffer {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::vector<std::size_t> blocks;
};

}  // namespace hvd
