// The table of element functions: one row per data type, compiled once per instruction set and chosen at run time.
// Constant after start; any thread.
#pragma once

#include <cstddef>

#include <horovod_cpp/data_type.h>

#include "ops/reduce/reducer.h"

namespace hvd {

using ScaleFunction = void (*)(void* data, std::size_t count, double factor);
using DivideFunction = void (*)(void* data, std::size_t count, int divisor);

struct ElementFunctions {
  DataType type;
  CombineFunction sum;
  CombineFunction min;
  CombineFunction max;
  CombineFunction product;
  ScaleFunction scale;
  DivideFunction divide;
};

/// The row of `type` for the best instruction set of this machine; nullptr for a number that names no type.
const ElementFunctions* find_element_functions(DataType type);

}  // namespace hvd
