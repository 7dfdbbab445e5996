// Broadcast along a binomial tree, in segments: Thakur, Rabenseifner and Gropp, IJHPCA 19 (2005), section 4.2
// ("binomial tree"). ceil(log2 p) levels; a rank receives the buffer once and sends it to at most log2 p others, each
// segment as soon as it has come.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

/// `root` is a rank in the process set. The root's bytes are in `bytes` beforehand.
Task<Status> binomial_broadcast(CollectiveContext& context, std::span<std::byte> bytes, int root);

}  // namespace hvd
