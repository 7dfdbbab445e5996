// The process sets of the job as values: who is in which, and whether it still works.
// The table itself runs under the Turn; `snapshot` readers on other threads use ProcessSetView (see runtime.h).
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "horovod_cpp/engine/request_response.h"
#include "ops/membership.h"

namespace hvd {

class ProcessSetTable {
 public:
  /// Set 0 has all ranks of `everyone`.
  explicit ProcessSetTable(MembershipRef everyone);

  /// The members; nullptr for an unknown id.
  MembershipRef find(ProcessSetId id) const;
  MembershipRef everyone() const { return sets_.at(0).membership; }

  /// The id of a set with just these ranks, if there is one.
  std::optional<ProcessSetId> id_of(const std::vector<int>& ranks) const;
  /// Adds a set of ascending global ranks under a given id; ids are given by the coordinator.
  void add(ProcessSetId id, const std::vector<int>& ranks);
  void remove(ProcessSetId id);
  ProcessSetId next_id() const { return next_id_; }

  /// A set that lost a member does not work any more; the first reason stays.
  void fail_sets_with(int rank, const Status& reason);
  void fail(ProcessSetId id, const Status& reason);
  const Status& failure(ProcessSetId id) const;

  std::vector<ProcessSetId> ids() const;
  std::vector<ProcessSetId> ids_with(int rank) const;

 private:
  struct Set {
    MembershipRef membership;
    Status failure;
  };

  std::map<ProcessSetId, Set> sets_;
  ProcessSetId next_id_ = 1;
};

}  // namespace hvd
