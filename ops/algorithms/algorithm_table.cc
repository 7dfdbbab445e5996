#include "ops/algorithms/algorithm_table.h"

#include <algorithm>
#include <array>

#include "ops/algorithms/adasum_halving.h"
#include "ops/algorithms/allgather_ring.h"
#include "ops/algorithms/alltoall_pairwise.h"
#include "ops/algorithms/barrier_dissemination.h"
#include "ops/algorithms/broadcast_binomial.h"
#include "ops/algorithms/recursive_doubling.h"
#include "ops/algorithms/reducescatter_ring.h"
#include "ops/algorithms/ring_allreduce.h"

namespace hvd {
namespace {

bool fits_small(const AlgorithmFacts& facts) { return facts.tensor_bytes <= facts.small_limit_bytes; }
bool fits_any(const AlgorithmFacts& /*facts*/) { return true; }

constexpr std::array kAllreduce{
    AllreduceAlgorithm{"recursive_doubling", recursive_doubling_allreduce, fits_small, false},
    AllreduceAlgorithm{"ring", ring_allreduce, fits_any, true},
};
constexpr std::array kAllgather{AllgatherAlgorithm{"ring", ring_allgather}};
constexpr std::array kBroadcast{BroadcastAlgorithm{"binomial", binomial_broadcast}};
constexpr std::array kReducescatter{ReducescatterAlgorithm{"ring", ring_reducescatter}};
constexpr std::array kAlltoall{AlltoallAlgorithm{"pairwise", pairwise_alltoall}};
constexpr std::array kAdasum{AdasumAlgorithm{"halving", adasum_halving}};
constexpr std::array kBarrier{BarrierAlgorithm{"dissemination", dissemination_barrier}};

}  // namespace

std::span<const AllreduceAlgorithm> allreduce_algorithms() { return kAllreduce; }
std::span<const AllgatherAlgorithm> allgather_algorithms() { return kAllgather; }
std::span<const BroadcastAlgorithm> broadcast_algorithms() { return kBroadcast; }
std::span<const ReducescatterAlgorithm> reducescatter_algorithms() { return kReducescatter; }
std::span<const AlltoallAlgorithm> alltoall_algorithms() { return kAlltoall; }
std::span<const AdasumAlgorithm> adasum_algorithms() { return kAdasum; }
std::span<const BarrierAlgorithm> barrier_algorithms() { return kBarrier; }

const AllreduceAlgorithm& select_allreduce(const AlgorithmFacts& facts) {
  return *std::find_if(kAllreduce.begin(), kAllreduce.end(),
                       [&](const AllreduceAlgorithm& algorithm) { return algorithm.fits(facts); });
}

}  // namespace hvd
