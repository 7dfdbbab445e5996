// Who has asked for what, on the coordinator: per (set, op, name), until all members have.
// Runs under the Turn of the coordinator.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "horovod_cpp/engine/request_response.h"
#include "ops/membership.h"

namespace hvd {

class ReadinessTable {
 public:
  struct Pending {
    MembershipRef membership;
    TimePoint since;
    int asked = 0;
    std::vector<bool> has_asked;                               ///< by set rank
    std::vector<std::pair<int, Request>> full;                 ///< (set rank, request) of those that sent it whole
    std::vector<std::pair<CacheId, std::vector<int>>> cached;  ///< (id, set ranks) of the others

    bool ready() const { return asked == membership->size(); }
    /// Global ranks, ascending.
    std::vector<int> missing() const;
    std::vector<int> present() const;
  };

  /// Notes a request of a set rank. False when that rank has asked already (a peer that breaks the rules).
  bool add_full(const MembershipRef& membership, int set_rank, Request request, TimePoint now);
  bool add_cached(const MembershipRef& membership, int set_rank, const OperationKey& key, CacheId id, TimePoint now);

  /// As if that rank had not asked; false when it had not.
  bool withdraw(const OperationKey& key, int set_rank);

  const Pending* find(const OperationKey& key) const;
  Pending take(const OperationKey& key);

  /// Keys that wait in a process set, in name order.
  std::vector<OperationKey> waiting_in(ProcessSetId process_set) const;
  /// All keys, those of process set 0 first.
  std::vector<OperationKey> waiting() const;
  /// Keys that wait since before `time`. Not of a join, which may well wait for long.
  std::vector<OperationKey> waiting_since_before(TimePoint time) const;
  /// Since when the longest but a join has waited; kNever when nothing waits.
  TimePoint oldest() const;
  bool empty() const { return pending_.empty(); }

 private:
  Pending& slot(const OperationKey& key, const MembershipRef& membership, TimePoint now);
  static bool note(Pending& pending, int set_rank);

  std::map<OperationKey, Pending> pending_;
};

}  // namespace hvd
