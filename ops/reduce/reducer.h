// Element-wise reduction and scaling of memory: what every algorithm calls, and the only SIMD of the project.
// Pure functions of their arguments; any thread.
#pragma once

#include <cstddef>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>
#include <horovod_cpp/status.h>

namespace hvd {

/// out[i] = lhs[i] op rhs[i] for `count` elements. `out` may be `lhs` or `rhs` itself; otherwise no overlap.
/// Operands keep their order, so that two ranks that name them alike get equal bits, NaN payloads included.
/// No alignment is asked for beyond that of the element type.
using CombineFunction = void (*)(void* out, const void* lhs, const void* rhs, std::size_t count);

/// A reduction on one element type. The bits of a result depend on the two operands alone: not on where in memory they
/// sit, nor on the instruction set of the machine.
/// - float16 and bfloat16: Sum and Product compute in float32 and round to nearest even once per call.
/// - NaN: Sum and Product give the left operand's if it has one, else the right one's, made quiet. Min and Max give it
///   as it is, and take -0 for less than +0.
/// - Integers wrap. bool: Sum and Max are "or", Min and Product are "and"; any byte but 0 is true, results are 0 or 1.
struct Reducer {
  CombineFunction combine = nullptr;
  std::size_t element_bytes = 0;
};

/// The reducer of (type, op); kAverage reduces like kSum (divide with `divide` after the last step).
/// kInvalidArgument for kAdasum or numbers outside the enumerations.
Result<Reducer> find_reducer(DataType type, ReduceOp op);

/// data[i] = data[i] * factor. Integers and bool: computed in float64, truncated toward zero, saturated; NaN gives 0.
/// float32, float16 and bfloat16: in float32, with the factor rounded to float32. A factor of 1 does nothing.
/// kInvalidArgument for an unknown type.
Status scale(void* data, DataType type, std::size_t count, double factor);

/// data[i] = data[i] / divisor. Integers: truncating; bool stays as it is. float32, float16 and bfloat16: in float32,
/// with the divisor rounded to float32. A divisor of 1 does nothing.
/// kInvalidArgument for an unknown type or a divisor below 1.
Status divide(void* data, DataType type, std::size_t count, int divisor);

}  // namespace hvd
