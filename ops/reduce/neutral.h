// The element that changes nothing in a reduction: what a rank brings that has no data.
// Pure functions of their arguments; any thread.
#pragma once

#include <cstddef>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>

namespace hvd {

/// Fills `count` elements: 0 for Sum, Average and Adasum, 1 for Product, the highest value (infinity, true) for Min,
/// the lowest for Max.
void fill_neutral(void* data, DataType type, std::size_t count, ReduceOp op);

}  // namespace hvd
