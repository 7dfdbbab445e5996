// Carries out agreed calls on host memory: packs, picks the algorithm, scales, unpacks.
// Joins algorithms, transports and reduction. Runs under the Turn.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/algorithms/algorithm_table.h"
#include "ops/host_buffers.h"

namespace hvd {

struct AllreduceTensor {
  const std::byte* input = nullptr;  ///< may be `output`; nullptr: elements that change nothing (of a joined rank)
  std::byte* output = nullptr;       ///< nullptr in a fused call: the result is not wanted
  std::size_t count = 0;
};

/// Tensors of one fused call (Adasum: one tensor): one data type, one reduction, and all of them small or all large
/// (`small_limit_bytes`), so that the algorithm of each is the algorithm of the call.
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

struct ReducescatterTensor {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;  ///< the rows of this rank, as `scattered_rows` says
  std::size_t rows = 0;
  std::size_t row_elements = 0;
};

/// Tensors of one call, of one data type and one reduction.
struct ReducescatterCall {
  std::vector<ReducescatterTensor> tensors;
  DataType dtype = DataType::kUint8;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
};

/// Rows that rank `index` of a set gets of a tensor: the first ranks get one more where they do not go out evenly.
std::size_t scattered_rows(std::size_t rows, int size, int index);

Task<Status> host_reducescatter(CollectiveContext& context, ReducescatterCall call);

/// Block i of `input` goes to rank i of the set, block i of `output` comes from it; sizes in bytes.
Task<Status> host_alltoall(CollectiveContext& context, const std::byte* input, std::byte* output,
                           std::vector<std::size_t> bytes_to, std::vector<std::size_t> bytes_from);

/// Tells each rank of the set one number; `told[i]` is the one of rank i, `to[i]` the one for it.
Task<Status> host_exchange_counts(CollectiveContext& context, std::vector<std::int64_t> to,
                                  std::vector<std::int64_t>& told);

Task<Status> host_barrier(CollectiveContext& context);

}  // namespace hvd
