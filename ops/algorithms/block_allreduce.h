// Allreduce among the ranks of one host that read each other's blocks (ops/transport/shared_blocks.h): no message but a
// word that each rank writes and the others look at.
//
// block_allreduce: each rank shows its operand, and sums the operands of all. Steps: 1. Bytes copied by each rank: n,
// read by it: n (p-1).
//
// block_scatter_allreduce: each rank shows its operand, sums its chunk from the operands of all, shows the sum in the
// same place, and reads the sums of the others. The reduce-scatter and allgather of van de Geijn, "On global combine
// operations" (1994), on memory that all see. Steps: 2. Bytes copied by each rank: n, read by it: 2 n (p-1)/p.
//
// Room: the slot, and p/2 small pieces. What is summed, and in which order, is as in recursive
// doubling or (..._as_ring) as in the ring. Nothing is changed before all ranks have begun the call.
#pragma once

#include "common/loop/task.h"
#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> block_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);
Task<Status> block_scatter_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);
Task<Status> block_scatter_allreduce_as_ring(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

}  // namespace hvd
