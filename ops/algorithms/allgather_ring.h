// Allgather of uneven blocks on a ring: Thakur, Rabenseifner and Gropp, IJHPCA 19 (2005), section 4.1 ("ring").
// p-1 steps; each rank sends all blocks but one and receives all but its own.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> ring_allgather(CollectiveContext& context, GatherBuffer buffer);

}  // namespace hvd
