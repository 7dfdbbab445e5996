// Barrier by dissemination: Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", IJPP 17 (1988).
// ceil(log2 p) rounds of one empty message each.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> dissemination_barrier(CollectiveContext& context);

}  // namespace hvd
