// Allreduce among few ranks that read each other's memory: each rank sums its chunk from the operands of all, one after
// the other, and reads the sums of the others. The reduce-scatter and allgather of van de Geijn, "On global combine
// operations" (1994), without intermediate copies. Steps: 2, where a ring has 2 (p-1). Bytes read by each rank:
// 2 n (p-1)/p. Room: none.
//
// What is summed, and in which order, is as in the ring: the bits of a result do not tell which of them was taken.
#pragma once

#include "common/loop/task.h"
#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> in_turn_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

}  // namespace hvd
