// The algorithms that exist and which one a call takes. A choice depends only on facts that all ranks share.
#pragma once

#include <span>
#include <string_view>

#include "ops/algorithms/algorithm.h"

namespace hvd {

/// Facts that all ranks share.
struct AlgorithmFacts {
  std::size_t tensor_bytes = 0;  ///< of one tensor, not of what it is fused with
  int size = 1;
  std::size_t small_limit_bytes = 0;
  bool standing = false;           ///< begun before it is known that all ranks begin it
  std::size_t slot_bytes = 0;      ///< of the blocks that the ranks read; 0: they have none
  bool pulls_on_one_host = false;  ///< all ranks share a host, and may read each other's memory
};

struct AllreduceAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, ReduceBuffer buffer, Reducer reducer);
  bool (*fits)(const AlgorithmFacts& facts);
  bool uses_chunks;  ///< a fused buffer is laid out chunk by chunk
  bool sends;        ///< messages; otherwise it uses blocks, and nothing arrives for a call that is not begun
};

struct AllgatherAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, GatherBuffer buffer);
};

struct BroadcastAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, std::span<std::byte> bytes, int root);
};

struct ReducescatterAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, ScatterBuffer buffer, Reducer reducer);
};

struct AlltoallAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, ExchangeBuffer buffer);
};

struct AdasumAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context, std::span<std::byte> data, DataType dtype);
};

struct BarrierAlgorithm {
  std::string_view name;
  Task<Status> (*run)(CollectiveContext& context);
};

/// In order of preference: the first that fits is taken, and the last fits always.
std::span<const AllreduceAlgorithm> allreduce_algorithms();
std::span<const AllgatherAlgorithm> allgather_algorithms();
std::span<const BroadcastAlgorithm> broadcast_algorithms();
std::span<const ReducescatterAlgorithm> reducescatter_algorithms();
std::span<const AlltoallAlgorithm> alltoall_algorithms();
std::span<const AdasumAlgorithm> adasum_algorithms();
std::span<const BarrierAlgorithm> barrier_algorithms();

const AllreduceAlgorithm& select_allreduce(const AlgorithmFacts& facts);

}  // namespace hvd
