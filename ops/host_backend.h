// Carries out agreed calls on host memory: packs, picks the algorithm, scales, unpacks.
// Joins algorithms, transports and reduction. Runs under the Turn.
#pragma once

#include <memory>
#include <vector>

#include "ops/algorithms/algorithm_table.h"
#include "ops/host_buffers.h"

namespace hvd {

struct AllreduceTensor {
  const std::byte* input = nullptr;  ///< may be `output`
  std::byte* output = nullptr;
  std::size_t count = 0;
};

/// Tensors of one fused call: one data type, one reduction, and all of them small or all large (`small_limit_bytes`),
/// so that the algorithm of each is the algorithm of the call.
struct AllreduceCall {
  std::vector<AllreduceTensor> tensors;
  DataType dtype = DataType::kUint8;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
  std::size_t small_limit_bytes = 0;
  std::span<std::byte> fusion;  ///< at least the sum of the tensors' bytes, when there are several
};

/// The bytes that the call needs in `fusion`; 0 for a single tensor.
std::size_t fusion_bytes(const AllreduceCall& call);

Task<Status> host_allreduce(CollectiveContext& context, AllreduceCall call);

/// `bytes_by_rank`: the block of each rank of the set; `output` holds them one behind the other.
Task<Status> host_allgather(CollectiveContext& context, const std::byte* input, std::byte* output,
                            std::vector<std::size_t> bytes_by_rank);

/// `root` is a rank in the set. On the root, `input` is copied to `output` unless they are one.
Task<Status> host_broadcast(CollectiveContext& context, const std::byte* input, std::byte* output, std::size_t bytes,
                            int root);

Task<Status> host_barrier(CollectiveContext& context);

}  // namespace hvd
