// How NCCL reduces elements of each type: some as another type, which gives the same.
// Pure; any thread.
#pragma once

#include <cstdint>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>

#include "ops/nccl/nccl_api.h"

namespace hvd {

struct NcclReduction {
  DataType as;  ///< what lies in memory while NCCL reduces
  nccl::ElementType type;
  nccl::RedOp op;  ///< kSum for kAverage: the division comes afterwards
};

NcclReduction nccl_reduction(DataType dtype, ReduceOp op);

/// The bits of an element of `reduction.as` that changes nothing, and that is still such an element of `dtype` once it
/// has come back to that type.
std::uint64_t neutral_bits(DataType dtype, const NcclReduction& reduction, ReduceOp op);

}  // namespace hvd
