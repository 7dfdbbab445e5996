// The numbers that ranks bring, and what an operation must make of them: computed here in double precision, one element
// at a time. Pure.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "tests/simulator/scenario.h"

namespace hvd::simulator {

/// What `rank` brings to operation number `index`.
std::vector<std::byte> input_of(const Scenario& scenario, int index, int rank);

/// Elements that `rank` brings, as planned.
std::size_t count_of(const OperationPlan& plan, const SetPlan& set, int rank);

/// What a member must get, and how near it must come.
class Reference {
 public:
  Reference(const Scenario& scenario, int index);

  /// Empty when `result` is right, to the bit unless the operation is inexact; otherwise the first wrong element.
  std::string compare(std::span<const std::byte> result) const;

 private:
  DataType dtype_;
  bool inexact_;
  std::vector<double> values_;    // of inexact operations
  std::vector<std::byte> exact_;  // in the type of the tensor
};

}  // namespace hvd::simulator
