// Reduce-scatter on a ring: the first half of the ring allreduce (see ring_allreduce.h), turned by one rank so that
// each ends with its own chunk. p-1 steps; each rank sends and receives (p-1)/p of the bytes. The input stays as it is:
// partial sums live in two chunks of memory, of which one is filled while the other is sent.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> ring_reducescatter(CollectiveContext& context, ScatterBuffer buffer, Reducer reducer);

}  // namespace hvd
