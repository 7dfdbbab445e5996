// Alltoall of uneven blocks by pairwise exchange: Thakur, Rabenseifner and Gropp, IJHPCA 19 (2005), section 4.3 ("long
// messages"), with all pairs under way at once, a window of segments each.
// Each rank sends p-1 blocks and receives p-1; nothing is copied on the way but its own block.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> pairwise_alltoall(CollectiveContext& context, ExchangeBuffer buffer);

}  // namespace hvd
