// Judges how each handle ended: the right numbers, or an error that this scenario allows.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "horovod_cpp/engine/handle_state.h"
#include "tests/simulator/checker.h"
#include "tests/simulator/scenario.h"
#include "tests/simulator/tensor_values.h"

namespace hvd::simulator {

class Ends {
 public:
  Ends(const Scenario& scenario, Checker& checker);

  /// The handle of operation `index` on `rank` is done; `result` is where an in-place or given output lies.
  void on_resolved(int rank, int index, HandleState& handle, std::span<const std::byte> result);
  /// What enqueue itself refused.
  void on_refused(int rank, int index, const Status& status);
  /// A program gave the job up, as a script does that got an error it cannot go on from.
  void expect_shutdown() { shutdown_expected_ = true; }
  void on_fault_injected() { fault_injected_ = true; }
  /// After the last event.
  void check_all_alike();
  /// Of each operation whose sum rounds, the bits of the result; empty for others and where it failed.
  std::vector<std::vector<std::byte>> rounded_sums() const;

  std::int64_t errors() const { return errors_; }

 private:
  struct Operation {
    std::unique_ptr<Reference> reference;
    std::vector<std::byte> first_result;
    int good = 0;
    int failed = 0;
    ProcessSetId added = 0;
  };

  const OperationPlan& plan(int index) const { return scenario_.operations[static_cast<std::size_t>(index)]; }
  void check_result(int rank, int index, HandleState& handle, std::span<const std::byte> result);
  void check_error(int rank, int index, const Status& status);
  bool must_fail_for_joined(int index) const;
  bool allowed(int index, const Status& status) const;
  std::string named(int index) const;

  const Scenario& scenario_;
  Checker& checker_;
  std::vector<Operation> operations_;
  bool shutdown_expected_ = false;
  bool fault_injected_ = false;
  std::int64_t errors_ = 0;
};

}  // namespace hvd::simulator
