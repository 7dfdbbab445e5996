// Adasum by recursive vector halving and distance doubling: Maleki et al., "Scaling Distributed Training with Adaptive
// Summation", MLSys 2021, algorithm 1 (AdasumRVH); ranks beyond a power of two are folded as in recursive_doubling.h.
// Adasum(a, b) = (1 - a.b / (2 a.a)) a + (1 - a.b / (2 b.b)) b, over the tree of ranks: like an average of vectors that
// point the same way, and like the sum of those that are orthogonal.
// 2 log2 p steps that move 2(p-1)/p of the bytes, and log2 p sums of three numbers in groups of ranks.
#pragma once

#include "ops/algorithms/algorithm.h"

namespace hvd {

/// `data` is operand and result: elements of a floating-point type.
Task<Status> adasum_halving(CollectiveContext& context, std::span<std::byte> data, DataType dtype);

}  // namespace hvd
