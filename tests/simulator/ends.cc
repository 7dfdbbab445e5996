#include "tests/simulator/ends.h"

#include <fmt/format.h>

#include <algorithm>

namespace hvd::simulator {
namespace {

constexpr int kCoordinator = 0;

bool says(const Status& status, std::string_view text) { return status.text().find(text) != std::string::npos; }

}  // namespace

Ends::Ends(const Scenario& scenario, Checker& checker)
    : scenario_(scenario),
      checker_(checker),
      operations_(scenario.operations.size()),
      shutdown_expected_(scenario.shutdown.has_value() || scenario.has_absent_rank) {}

std::string Ends::named(int index) const {
  return fmt::format("operation #{} ({} '{}', slot {})", index, name_of(plan(index).op), plan(index).name,
                     plan(index).slot);
}

void Ends::on_resolved(int rank, int index, HandleState& handle, std::span<const std::byte> result) {
  Operation& operation = operations_[static_cast<std::size_t>(index)];
  if (!handle.status().ok()) {
    ++errors_;
    ++operation.failed;
    check_error(rank, index, handle.status());
    return;
  }
  ++operation.good;
  if (must_fail_for_joined(index)) {
    checker_.report(invariant::kErrorEverywhere,
                    fmt::format("{} ended well on rank {}, though members had joined", named(index), rank));
    return;
  }
  if (plan(index).is_mismatch()) {
    checker_.report(invariant::kErrorEverywhere,
                    fmt::format("{} ended well on rank {}, though rank {} differs from the others", named(index), rank,
                                plan(index).odd_rank));
    return;
  }
  check_result(rank, index, handle, result);
}

void Ends::check_result(int rank, int index, HandleState& handle, std::span<const std::byte> result) {
  Operation& operation = operations_[static_cast<std::size_t>(index)];
  const OperationOutput& output = handle.output();
  if (plan(index).op == OpKind::kProcessSetAdd) {
    if (operation.added == 0) operation.added = output.process_set;
    if (operation.added != output.process_set || output.process_set == 0) {
      checker_.report(invariant::kRightSum, fmt::format("{} gave the id {} on rank {}, another rank got {}",
                                                        named(index), output.process_set, rank, operation.added));
    }
    return;
  }
  std::vector<std::byte> made;
  for (const OutputTensor& tensor : output.tensors) {
    made.insert(made.end(), tensor.memory.get(), tensor.memory.get() + tensor.bytes);
  }
  if (!output.tensors.empty()) result = made;
  if (!operation.reference) operation.reference = std::make_unique<Reference>(scenario_, index);
  std::string wrong = operation.reference->compare(result, rank);
  if (wrong.empty() && plan(index).inexact) {
    if (operation.good == 1) operation.first_result.assign(result.begin(), result.end());
    if (!std::equal(result.begin(), result.end(), operation.first_result.begin(), operation.first_result.end())) {
      wrong = "the bits differ from those of another rank";
    }
  }
  if (!wrong.empty()) {
    checker_.report(invariant::kRightSum,
                    fmt::format("{} ({}) on rank {}: {}", named(index), name_of(plan(index).reduce_op), rank, wrong));
  }
}

void Ends::check_error(int rank, int index, const Status& status) {
  if (allowed(index, status)) return;
  checker_.report(plan(index).is_mismatch() ? invariant::kErrorEverywhere : invariant::kExpectedEnd,
                  fmt::format("{} on rank {} ended with an error that does not belong here: {}", named(index), rank,
                              status.text()));
}

// Only these can do without a rank that has no more data.
bool Ends::must_fail_for_joined(int index) const {
  const OperationPlan& operation = plan(index);
  const std::size_t members = scenario_.sets[static_cast<std::size_t>(operation.slot)].ranks.size();
  return operation.op != OpKind::kAllreduce && operation.op != OpKind::kBarrier &&
         scenario_.present(operation).size() < members;
}

bool Ends::allowed(int index, const Status& status) const {
  const OperationPlan& operation = plan(index);
  if (operation.is_mismatch() && status.code() == StatusCode::kInvalidArgument) {
    return says(status, fmt::format("'{}'", operation.name)) && says(status, "mismatched");
  }
  if (must_fail_for_joined(index) && says(status, fmt::format("'{}'", operation.name)) && says(status, "joined")) {
    return true;
  }
  if (scenario_.death) {
    const int dead = scenario_.death->rank;
    const bool concerned =
        dead == kCoordinator || scenario_.sets[static_cast<std::size_t>(operation.slot)].contains(dead);
    if (concerned && says(status, fmt::format("rank {} is lost", dead))) return true;
  }
  // A rank whose join has failed takes no part any more in what others had agreed on with it.
  if (scenario_.death && !scenario_.last_batch.empty() && says(status, "is not there any more on rank")) return true;
  // A rank that knew of the death, or waits for a hung one no longer, leaves, and takes the calls that others still
  // have with it.
  if ((scenario_.death || scenario_.hang) && shutdown_expected_ && says(status, "has left the job")) return true;
  // A member may hear of the end, and leave, before this rank does, which has begun a standing call meanwhile.
  const bool may_stand = operation.op == OpKind::kAllreduce && scenario_.options.standing_after > 0;
  if (shutdown_expected_ && may_stand && says(status, "has left the job")) return true;
  if (shutdown_expected_ && (says(status, "shut down") || says(status, "HOROVOD_STALL_SHUTDOWN"))) return true;
  if (fault_injected_ && says(status, "HOROVOD_FAULT")) return true;
  const bool of_removed_set = operation.op == OpKind::kProcessSetRemove ||
                              scenario_.sets[static_cast<std::size_t>(operation.slot)].added_on_the_way;
  return scenario_.careless_removal && of_removed_set && says(status, "process set");
}

void Ends::on_refused(int rank, int index, const Status& status) {
  if (!allowed(index, status) && !(scenario_.careless_removal && says(status, "Process set provided"))) {
    checker_.report(invariant::kExpectedEnd,
                    fmt::format("enqueue of {} on rank {} was refused: {}", named(index), rank, status.text()));
  }
}

// Without a death, a hang or a fault all members get the same answer: either the calls of the stream are carried out by
// all, or the job's end meets the operation on all.
void Ends::check_all_alike() {
  if (scenario_.death || scenario_.hang || scenario_.fault) return;
  for (std::size_t i = 0; i < operations_.size(); ++i) {
    const Operation& operation = operations_[i];
    const std::size_t members = scenario_.present(plan(static_cast<int>(i))).size();
    if (operation.good == 0 || static_cast<std::size_t>(operation.good) == members) continue;
    checker_.report(invariant::kErrorEverywhere, fmt::format("{} ended well on {} of {} ranks only",
                                                             named(static_cast<int>(i)), operation.good, members));
  }
}

std::vector<std::vector<std::byte>> Ends::rounded_sums() const {
  std::vector<std::vector<std::byte>> sums;
  for (const Operation& operation : operations_) sums.push_back(operation.first_result);
  return sums;
}

}  // namespace hvd::simulator
