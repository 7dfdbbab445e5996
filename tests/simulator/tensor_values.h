// The numbers that ranks bring, and what an operation must make of them: computed here in double precision, one element
// at a time. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tests/simulator/scenario.h"

namespace hvd::simulator {

/// What `rank` brings to operation number `index`; the tensors of a group lie one behind the other.
std::vector<std::byte> input_of(const Scenario& scenario, int index, int rank);

/// Elements of each tensor that `rank` brings, as planned; none for operations without tensors.
std::vector<std::size_t> counts_of(const OperationPlan& plan, const SetPlan& set, int rank);

/// How `rank` lays out each tensor that it brings: strides in elements.
std::vector<std::vector<std::int64_t>> strides_of_tensors(const OperationPlan& plan, const SetPlan& set, int rank);

/// Tensors that lie one behind the other in C order, as `rank` lays them out; and back.
std::vector<std::byte> laid_out(const OperationPlan& plan, const SetPlan& set, int rank,
                                std::span<const std::byte> tensors);
std::vector<std::byte> in_c_order(const OperationPlan& plan, const SetPlan& set, int rank,
                                  std::span<const std::byte> memory);

/// What a member must get, and how near it must come.
class Reference {
 public:
  Reference(const Scenario& scenario, int index);

  /// Empty when `result` on `rank` is right, to the bit unless the operation is inexact; otherwise the first wrong
  /// element. The tensors of a group lie one behind the other.
  std::string compare(std::span<const std::byte> result, int rank) const;

 private:
  std::vector<std::byte> due(int rank) const;

  const Scenario& scenario_;
  int index_;
  DataType dtype_;
  bool inexact_;
  std::vector<double> values_;    // of inexact operations
  std::vector<std::byte> exact_;  // in the type of the tensor; reducescatter: the whole reduction
};

}  // namespace hvd::simulator
