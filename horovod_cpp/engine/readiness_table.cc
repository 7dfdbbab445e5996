#include "horovod_cpp/engine/readiness_table.h"

#include <algorithm>

namespace hvd {
namespace {

std::vector<int> ranks_where(const Membership& membership, const std::vector<bool>& has_asked, bool wanted) {
  std::vector<int> ranks;
  for (std::size_t i = 0; i < has_asked.size(); ++i) {
    if (has_asked[i] == wanted) ranks.push_back(membership.ranks[i]);
  }
  return ranks;
}

}  // namespace

std::vector<int> ReadinessTable::Pending::missing() const { return ranks_where(*membership, has_asked, false); }
std::vector<int> ReadinessTable::Pending::present() const { return ranks_where(*membership, has_asked, true); }

ReadinessTable::Pending& ReadinessTable::slot(const OperationKey& key, const MembershipRef& membership, TimePoint now) {
  const auto [place, is_new] = pending_.try_emplace(key);
  Pending& pending = place->second;
  if (is_new) {
    pending.membership = membership;
    pending.since = now;
    pending.has_asked.resize(static_cast<std::size_t>(membership->size()));
  }
  return pending;
}

bool ReadinessTable::note(Pending& pending, int set_rank) {
  const auto index = static_cast<std::size_t>(set_rank);
  if (pending.has_asked[index]) return false;
  pending.has_asked[index] = true;
  ++pending.asked;
  return true;
}

bool ReadinessTable::add_full(const MembershipRef& membership, int set_rank, Request request, TimePoint now) {
  Pending& pending = slot(request.key, membership, now);
  if (!note(pending, set_rank)) return false;
  pending.full.emplace_back(set_rank, std::move(request));
  return true;
}

bool ReadinessTable::add_cached(const MembershipRef& membership, int set_rank, const OperationKey& key, CacheId id,
                                TimePoint now) {
  Pending& pending = slot(key, membership, now);
  if (!note(pending, set_rank)) return false;
  const auto same = std::find_if(pending.cached.begin(), pending.cached.end(),
                                 [&](const auto& ranks_of) { return ranks_of.first == id; });
  if (same != pending.cached.end()) {
    same->second.push_back(set_rank);
  } else {
    pending.cached.push_back({id, {set_rank}});
  }
  return true;
}

bool ReadinessTable::withdraw(const OperationKey& key, int set_rank) {
  const auto found = pending_.find(key);
  if (found == pending_.end()) return false;
  Pending& pending = found->second;
  const auto index = static_cast<std::size_t>(set_rank);
  if (!pending.has_asked[index]) return false;
  pending.has_asked[index] = false;
  std::erase_if(pending.full, [&](const auto& one) { return one.first == set_rank; });
  for (auto& [id, ranks] : pending.cached) std::erase(ranks, set_rank);
  std::erase_if(pending.cached, [](const auto& one) { return one.second.empty(); });
  if (--pending.asked == 0) pending_.erase(found);
  return true;
}

const ReadinessTable::Pending* ReadinessTable::find(const OperationKey& key) const {
  const auto found = pending_.find(key);
  return found == pending_.end() ? nullptr : &found->second;
}

ReadinessTable::Pending ReadinessTable::take(const OperationKey& key) {
  const auto found = pending_.find(key);
  Pending taken = std::move(found->second);
  pending_.erase(found);
  return taken;
}

std::vector<OperationKey> ReadinessTable::waiting_in(ProcessSetId process_set) const {
  std::vector<OperationKey> keys;
  for (const auto& [key, pending] : pending_) {
    if (key.process_set == process_set) keys.push_back(key);
  }
  return keys;
}

std::vector<OperationKey> ReadinessTable::waiting() const {
  std::vector<OperationKey> keys;
  for (const auto& [key, pending] : pending_) keys.push_back(key);
  return keys;
}

std::vector<OperationKey> ReadinessTable::waiting_since_before(TimePoint time) const {
  std::vector<OperationKey> keys;
  for (const auto& [key, pending] : pending_) {
    if (pending.since < time && key.op != OpKind::kJoin) keys.push_back(key);
  }
  return keys;
}

TimePoint ReadinessTable::oldest() const {
  TimePoint oldest = kNever;
  for (const auto& [key, pending] : pending_) {
    if (key.op != OpKind::kJoin) oldest = std::min(oldest, pending.since);
  }
  return oldest;
}

}  // namespace hvd
