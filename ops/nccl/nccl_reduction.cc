#include "ops/nccl/nccl_reduction.h"

#include <cstring>

#include "ops/reduce/neutral.h"

namespace hvd {
namespace {

nccl::ElementType element_type(DataType dtype) {
  switch (dtype) {
    case DataType::kInt8:
      return nccl::kInt8;
    case DataType::kInt16:  // goes as int32
    case DataType::kInt32:
      return nccl::kInt32;
    case DataType::kInt64:
      return nccl::kInt64;
    case DataType::kFloat16:
      return nccl::kFloat16;
    case DataType::kFloat32:
      return nccl::kFloat32;
    case DataType::kFloat64:
      return nccl::kFloat64;
    case DataType::kBfloat16:
      return nccl::kBfloat16;
    case DataType::kUint8:
    case DataType::kBool:
      break;
  }
  return nccl::kUint8;
}

}  // namespace

NcclReduction nccl_reduction(DataType dtype, ReduceOp op) {
  NcclReduction reduction{dtype, element_type(dtype), nccl::kSum};
  switch (op) {
    case ReduceOp::kMin:
      reduction.op = nccl::kMin;
      break;
    case ReduceOp::kMax:
      reduction.op = nccl::kMax;
      break;
    case ReduceOp::kProduct:
      reduction.op = nccl::kProd;
      break;
    default:
      break;
  }
  // The low 16 bits of sums and products of wider integers are those of the narrow ones.
  if (dtype == DataType::kInt16) reduction.as = DataType::kInt32;
  // "or" and "and" of bytes that are 0 or 1.
  if (dtype == DataType::kBool) {
    reduction.op = op == ReduceOp::kMin || op == ReduceOp::kProduct ? nccl::kMin : nccl::kMax;
  }
  return reduction;
}

std::uint64_t neutral_bits(DataType dtype, const NcclReduction& reduction, ReduceOp op) {
  std::uint64_t bits = 0;
  fill_neutral(&bits, dtype, 1, op);
  if (reduction.as == dtype) return bits;
  std::int16_t narrow = 0;  // the only type that travels as a wider one
  std::memcpy(&narrow, &bits, sizeof narrow);
  const std::int32_t wide = narrow;
  std::memcpy(&bits, &wide, sizeof wide);
  return bits;
}

}  // namespace hvd
