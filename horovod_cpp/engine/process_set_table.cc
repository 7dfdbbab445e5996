#include "horovod_cpp/engine/process_set_table.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "common/check.h"

namespace hvd {

ProcessSetTable::ProcessSetTable(MembershipRef everyone) { sets_[0] = {std::move(everyone), {}}; }

MembershipRef ProcessSetTable::find(ProcessSetId id) const {
  const auto found = sets_.find(id);
  return found == sets_.end() ? nullptr : found->second.membership;
}

std::optional<ProcessSetId> ProcessSetTable::id_of(const std::vector<int>& ranks) const {
  for (const auto& [id, set] : sets_) {
    if (set.membership->ranks == ranks) return id;
  }
  return std::nullopt;
}

void ProcessSetTable::add(ProcessSetId id, const std::vector<int>& ranks) {
  const Membership& all = *everyone();
  auto members = std::make_shared<Membership>();
  members->generation = all.generation;
  members->ranks = ranks;
  for (const int rank : ranks) {
    const std::optional<int> index = all.index_of(rank);
    HVD_CHECK(index.has_value());  // the rules of the operation have made sure
    members->hosts.push_back(all.hosts[static_cast<std::size_t>(*index)]);
  }
  sets_[id] = {std::move(members), Status()};
  next_id_ = std::max<ProcessSetId>(next_id_, static_cast<ProcessSetId>(id + 1));
}

void ProcessSetTable::remove(ProcessSetId id) { sets_.erase(id); }

void ProcessSetTable::fail_sets_with(int rank, const Status& reason) {
  for (auto& [id, set] : sets_) {
    if (set.failure.ok() && set.membership->contains(rank)) set.failure = reason;
  }
}

void ProcessSetTable::fail(ProcessSetId id, const Status& reason) {
  const auto found = sets_.find(id);
  if (found != sets_.end() && found->second.failure.ok()) found->second.failure = reason;
}

const Status& ProcessSetTable::failure(ProcessSetId id) const {
  static const Status none;
  const auto found = sets_.find(id);
  return found == sets_.end() ? none : found->second.failure;
}

std::vector<ProcessSetId> ProcessSetTable::ids() const {
  std::vector<ProcessSetId> all;
  for (const auto& [id, set] : sets_) all.push_back(id);
  return all;
}

std::vector<ProcessSetId> ProcessSetTable::ids_with(int rank) const {
  std::vector<ProcessSetId> some;
  for (const auto& [id, set] : sets_) {
    if (set.membership->contains(rank)) some.push_back(id);
  }
  return some;
}

}  // namespace hvd
