// Finds the function of (data type, reduction) in the table and refuses what has none.
// Pure functions of their arguments; any thread.
#include "ops/reduce/reducer.h"

#include <fmt/format.h>

#include "ops/reduce/element_functions.h"

namespace hvd {
namespace {

Status unknown_type(DataType type) {
  return Status::invalid_argument(
      fmt::format("element type number {} is none of ours (0 to 10, without 2); all ranks must run the same release "
                  "of horovod_cpp",
                  static_cast<int>(type)));
}

CombineFunction combine_of(const ElementFunctions& row, ReduceOp op) {
  switch (op) {
    case ReduceOp::kAverage:
    case ReduceOp::kSum:
      return row.sum;
    case ReduceOp::kMin:
      return row.min;
    case ReduceOp::kMax:
      return row.max;
    case ReduceOp::kProduct:
      return row.product;
    case ReduceOp::kAdasum:
      return nullptr;
  }
  return nullptr;
}

}  // namespace

Result<Reducer> find_reducer(DataType type, ReduceOp op) {
  const ElementFunctions* row = find_element_functions(type);
  if (row == nullptr) return unknown_type(type);
  const CombineFunction combine = combine_of(*row, op);
  if (combine == nullptr) {
    return Status::invalid_argument(
        fmt::format("reduction {} ({}) does not combine element by element; use Average, Sum, Min, Max or Product",
                    name_of(op), static_cast<int>(op)));
  }
  return Reducer{combine, size_of(type)};
}

Status scale(void* data, DataType type, std::size_t count, double factor) {
  const ElementFunctions* row = find_element_functions(type);
  if (row == nullptr) return unknown_type(type);
  if (factor != 1.0) row->scale(data, count, factor);
  return {};
}

Status divide(void* data, DataType type, std::size_t count, int divisor) {
  const ElementFunctions* row = find_element_functions(type);
  if (row == nullptr) return unknown_type(type);
  if (divisor < 1) {
    return Status::invalid_argument(
        fmt::format("division of {} {} elements by {}; the divisor must be 1 or more", count, name_of(type), divisor));
  }
  if (divisor != 1) row->divide(data, count, divisor);
  return {};
}

}  // namespace hvd
