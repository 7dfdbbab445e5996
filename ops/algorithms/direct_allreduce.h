// Allreduce among few ranks in one or two steps: each rank deals with every other one at once. For standing calls.
//
// A standing call is begun before it is known that the others begin it, and may have to be withdrawn. So nothing of the
// input, which may be the output, is changed before every rank has sent something of this call.
//
// What is summed, and in which order, is as in recursive doubling or as in the ring: the bits of a result do not tell
// whether the call was a standing one. That order is the reason for the room that the operands of others take here.
#pragma once

#include "common/loop/task.h"
#include "ops/algorithms/algorithm.h"

namespace hvd {

/// Every rank sends all of its operand to every other one, and each sums by itself. Steps: 1. Bytes sent by each rank:
/// (p-1) n. Room: (p-1) n. The order is that of recursive doubling.
Task<Status> direct_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

/// Every rank gets its chunk of all operands, sums it and sends it to every other one: the direct reduce-scatter and
/// allgather of van de Geijn, "On global combine operations" (1994). Steps: 2. Bytes sent by each rank: 2 n (p-1)/p.
/// Room: n (p-1)/p. The order is that of recursive doubling.
Task<Status> direct_scatter_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);
/// The same in the order of the ring.
Task<Status> direct_scatter_allreduce_as_ring(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

}  // namespace hvd
