// Allreduce by recursive doubling, for small buffers: Thakur, Rabenseifner and Gropp, "Optimization of Collective
// Communication Operations in MPICH", IJHPCA 19 (2005), section 4.5 ("recursive doubling", with the usual folding of
// the ranks beyond a power of two).
// ceil(log2 p) steps (two more for folded ranks); each sends and receives the whole buffer.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

Task<Status> recursive_doubling_allreduce(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);

}  // namespace hvd
