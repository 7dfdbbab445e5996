#include "ops/algorithms/algorithm_table.h"

#include <algorithm>
#include <array>

#include "ops/algorithms/adasum_halving.h"
#include "ops/algorithms/allgather_ring.h"
#include "ops/algorithms/alltoall_pairwise.h"
#include "ops/algorithms/barrier_dissemination.h"
#include "ops/algorithms/block_allreduce.h"
#include "ops/algorithms/broadcast_binomial.h"
#include "ops/algorithms/direct_allreduce.h"
#include "ops/algorithms/in_turn_allreduce.h"
#include "ops/algorithms/recursive_doubling.h"
#include "ops/algorithms/reducescatter_ring.h"
#include "ops/algorithms/ring_allreduce.h"

namespace hvd {
namespace {

bool fits_small(const AlgorithmFacts& facts) { return facts.tensor_bytes <= facts.small_limit_bytes; }
bool fits_any(const AlgorithmFacts& /*facts*/) { return true; }

// One call with a block is in flight on a rank at a time, as is one standing call.
bool fits_slot(const AlgorithmFacts& facts) { return facts.standing && facts.tensor_bytes <= facts.slot_bytes; }
bool fits_block(const AlgorithmFacts& facts) {
  // Of two ranks each reads as much as with a second step; of more, all that is read more costs less up to here.
  const std::size_t most_bytes = std::size_t{facts.size == 2 ? 32U : 8U} << 10;
  return fits_slot(facts) && fits_small(facts) && facts.tensor_bytes <= most_bytes;
}
bool fits_block_scatter(const AlgorithmFacts& facts) { return fits_slot(facts) && fits_small(facts); }

// A standing call changes nothing before every rank has begun it. Of two ranks each knows that from the first message,
// whatever the algorithm; more of them take a direct one, which sums in the order of the one that is taken otherwise.
bool fits_direct(const AlgorithmFacts& facts) {
  constexpr std::size_t most_bytes = std::size_t{8} << 10;  // to each other rank, where a second step would cost more
  return facts.standing && facts.size > 2 && fits_small(facts) && facts.tensor_bytes <= most_bytes;
}
bool fits_direct_scatter(const AlgorithmFacts& facts) { return facts.standing && facts.size > 2 && fits_small(facts); }
bool fits_direct_scatter_as_ring(const AlgorithmFacts& facts) { return facts.standing && !fits_small(facts); }
// In the order of the ring, so that it may depend on what a tensor is fused with.
bool fits_in_turn(const AlgorithmFacts& facts) {
  constexpr int most_ranks = 8;  // each offers a message to each for every segment
  return facts.pulls_on_one_host && facts.size <= most_ranks && !fits_small(facts);
}

constexpr std::array kAllreduce{
    AllreduceAlgorithm{"block", block_allreduce, fits_block, false, false},
    AllreduceAlgorithm{"block_scatter", block_scatter_allreduce, fits_block_scatter, true, false},
    AllreduceAlgorithm{"block_scatter_as_ring", block_scatter_allreduce_as_ring, fits_slot, true, false},
    AllreduceAlgorithm{"direct", direct_allreduce, fits_direct, false, true},
    AllreduceAlgorithm{"direct_scatter", direct_scatter_allreduce, fits_direct_scatter, true, true},
    AllreduceAlgorithm{"direct_scatter_as_ring", direct_scatter_allreduce_as_ring, fits_direct_scatter_as_ring, true,
                       true},
    AllreduceAlgorithm{"in_turn", in_turn_allreduce, fits_in_turn, true, true},
    AllreduceAlgorithm{"recursive_doubling", recursive_doubling_allreduce, fits_small, false, true},
    AllreduceAlgorithm{"ring", ring_allreduce, fits_any, true, true},
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
