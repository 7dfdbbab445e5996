// Allreduce on a ring, for large buffers: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters
// of workstations", JPDC 69 (2009), section 4.
// 2(p-1) steps; each rank sends and receives 2(p-1)/p of the bytes, which is the least possible.
// chunk: one per rank; segment: one in flight.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> ring_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

}  // namespace hvd
