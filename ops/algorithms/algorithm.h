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

/// The operand of a reduce-scatter and this rank's share of the result. `chunks` has size+1 byte offsets within the
/// input; `output` has the bytes of this rank's chunk and does not overlap the input.
struct ScatterBuffer {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::vector<std::size_t> chunks;
};

/// What goes to each rank, one behind the other in `input`, and what comes from each, in `output`: `to` and `from` have
/// size+1 byte offsets. A rank's block for another has the size that the other one expects.
struct ExchangeBuffer {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::vector<std::size_t> to;
  std::vector<std::size_t> from;
};

/// The blocks of all ranks, one behind the other in `output`; `blocks` has size+1 byte offsets. The caller's own
/// block is in `input`.
struct GatherBuffer {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::vector<std::size_t> blocks;
};

}  // namespace hvd
