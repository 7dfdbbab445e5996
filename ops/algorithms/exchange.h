// One step between neighbours: a stretch goes out while another comes in, cut in segments, several in flight.
// Runs under the Turn.
#pragma once

#include <cstddef>
#include <span>

#include "common/loop/task.h"
#include "ops/collective_context.h"

namespace hvd {

struct OutgoingStretch {
  int to = 0;
  std::span<const std::byte> bytes;
};

/// With a reducer, what arrives is combined with `own` into `bytes`; otherwise it is copied there.
struct IncomingStretch {
  int from = 0;
  std::span<std::byte> bytes;
  const std::byte* own = nullptr;
  const Reducer* reducer = nullptr;
};

/// Ends when both stretches have passed, or with the first failure.
Task<Status> exchange(CollectiveContext& context, OutgoingStretch outgoing, IncomingStretch incoming);

}  // namespace hvd
