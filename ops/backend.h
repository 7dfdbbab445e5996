// What carries out an agreed call, on memory of one kind: the seam between the engine and host memory, NCCL and the
// like. One object per call. Runs under the Turn.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>
#include <horovod_cpp/status.h>

#include "common/loop/task.h"
#include "ops/collective_context.h"
#include "ops/device/device_memory.h"

namespace hvd {

struct AllreduceTensor {
  const std::byte* input = nullptr;  ///< may be `output`; nullptr: elements that change nothing (of a joined rank)
  std::byte* output = nullptr;       ///< nullptr: the result is not wanted
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
};

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

struct AllgatherTensor {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;             ///< the blocks of all ranks, one behind the other
  std::vector<std::size_t> bytes_by_rank;  ///< the block of each rank of the set
};

/// The tensors of one call.
struct AllgatherCall {
  std::vector<AllgatherTensor> tensors;
  std::size_t copy_limit_bytes = 0;  ///< several tensors that together are no more may be copied to travel as one
};

/// Block i of `input` goes to rank i of the set, block i of `output` comes from it; sizes in bytes.
struct AlltoallCall {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::vector<std::size_t> bytes_to;
  std::vector<std::size_t> bytes_from;
};

/// `root` is a rank in the set. On the root, `input` is copied to `output` unless they are one.
struct BroadcastCall {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t bytes = 0;
  int root = 0;
};

/// Memory that the engine makes for an output.
struct MadeMemory {
  std::shared_ptr<std::byte> memory;
  std::shared_ptr<DeviceBlock> block;  ///< of device memory: where it comes from
};

/// Of a block of device memory.
inline MadeMemory made_of(std::shared_ptr<DeviceBlock> block) {
  std::byte* const memory = block->memory;
  return {std::shared_ptr<std::byte>(block, memory), std::move(block)};
}

class Backend {
 public:
  virtual ~Backend() = default;

  /// Before anything else: until the call may put its work in line, in the agreed order.
  virtual Task<Status> begin(CollectiveContext& context) = 0;
  virtual Result<MadeMemory> make_output(std::size_t bytes) = 0;

  virtual Task<Status> allreduce(CollectiveContext& context, AllreduceCall call) = 0;
  virtual Task<Status> allgather(CollectiveContext& context, AllgatherCall call) = 0;
  virtual Task<Status> broadcast(CollectiveContext& context, BroadcastCall call) = 0;
  virtual Task<Status> reducescatter(CollectiveContext& context, ReducescatterCall call) = 0;
  virtual Task<Status> alltoall(CollectiveContext& context, AlltoallCall call) = 0;

  /// After everything else, well or not: the work is in line, and the next call may put its own behind it. Returns what
  /// the results have to be waited for by; nullptr where they are there; an error where nothing can wait for them. From
  /// then on `held` is kept until the memory of the call is not used any more.
  virtual Result<DeviceMarkRef> end(const Status& status, std::shared_ptr<void> held) = 0;
};

}  // namespace hvd
