#include "horovod_cpp/engine/standing_calls.h"

#include <algorithm>
#include <utility>

#include "ops/collective_context.h"

namespace hvd {

StandingUse use_of_call(std::uint64_t call) {
  return {static_cast<StandingNumber>(call >> 32 & kMostStanding), static_cast<std::uint32_t>(call)};
}

bool may_stand(const Response& response) {
  if (response.kind != Response::Kind::kExecute || response.op != OpKind::kAllreduce) return false;
  if (response.memory != MemoryKind::kHost || response.reduce_op == ReduceOp::kAdasum) return false;
  if (response.prescale != 1.0 || response.entries.size() != 1 || response.standing > kMostStanding) return false;
  const ResponseEntry& entry = response.entries.front();
  return entry.more.empty() && entry.cache_id != 0 && bytes_of(response.dtype, entry.shape) > 0;
}

void StandingCalls::grant(const Response& response) {
  const CacheId id = response.entries.front().cache_id;
  forget(id);
  numbers_[id] = response.standing;
  Standing& made = standing_[response.standing];
  made = {};
  made.response = response;
}

StandingCalls::Standing* StandingCalls::find(CacheId id) {
  const auto number = numbers_.find(id);
  return number == numbers_.end() ? nullptr : &standing_.at(number->second);
}

StandingCalls::Standing* StandingCalls::find(StandingUse said) {
  const auto found = standing_.find(said.number);
  return found == standing_.end() ? nullptr : &found->second;
}

Response StandingCalls::use_of(const Standing& standing, std::uint32_t use) {
  Response call = standing.response;
  call.call = standing_call(call.standing, use);
  return call;
}

// Peers may have begun the first use that this rank will not begin; none goes further without it.
void StandingCalls::discard_at_end(Standing& standing, Discards& discards) {
  if (standing.begun != standing.end || std::exchange(standing.discarded, true)) return;
  discards.push_back(use_of(standing, standing.end));
}

bool StandingCalls::may_begin(CacheId id) const {
  if (flight_ || numbers_.empty()) return false;
  const auto number = numbers_.find(id);
  if (number == numbers_.end()) return false;
  const Standing& standing = standing_.at(number->second);
  return standing.begun < std::min(standing.end, kMostStandingUses);
}

Response StandingCalls::begin(CacheId id, const Request& request, TimePoint now, Discards& discards) {
  Standing& standing = *find(id);
  const std::uint32_t use = standing.begun++;
  standing.asked = standing.begun;
  discard_at_end(standing, discards);
  Response call = use_of(standing, use);
  flight_.emplace();
  flight_->use = {call.standing, use};
  flight_->process_set = call.process_set;
  flight_->call = call.call;
  flight_->request = request;
  flight_->overdue_at = now + kPatience;
  return call;
}

std::optional<StandingUse> StandingCalls::end(CacheId id, Discards& discards) {
  Standing* standing = find(id);
  if (standing == nullptr || standing->begun >= standing->end) return std::nullopt;
  standing->end = standing->begun;
  discard_at_end(*standing, discards);
  return StandingUse{standing->response.standing, standing->end};
}

template <typename Wanted>
std::vector<StandingUse> StandingCalls::end_if(Wanted wanted, Discards& discards) {
  std::vector<StandingUse> ended;
  for (auto& [number, standing] : standing_) {
    if (!wanted(standing) || standing.begun >= standing.end) continue;
    standing.end = standing.begun;
    discard_at_end(standing, discards);
    ended.push_back({number, standing.end});
  }
  return ended;
}

std::vector<StandingUse> StandingCalls::end_all(Discards& discards) {
  return end_if([](const Standing& /*standing*/) { return true; }, discards);
}

std::vector<StandingUse> StandingCalls::end_set(ProcessSetId process_set, Discards& discards) {
  return end_if([&](const Standing& standing) { return standing.response.process_set == process_set; }, discards);
}

bool StandingCalls::on_ended(StandingUse said, Discards& discards) {
  Standing* standing = find(said);
  if (standing == nullptr || said.use >= standing->end) return false;
  standing->end = said.use;
  discard_at_end(*standing, discards);
  return flight_ && flight_->use.number == said.number && flight_->use.use >= said.use;
}

std::optional<StandingUse> StandingCalls::on_overdue(StandingUse said, Discards& discards) {
  Standing* standing = find(said);
  if (standing == nullptr || standing->begun > said.use) return std::nullopt;
  return end(standing->response.entries.front().cache_id, discards);
}

std::optional<StandingCalls::Begun> StandingCalls::on_call_ended(std::uint64_t call) {
  if (!flight_ || flight_->call != call) return std::nullopt;
  std::optional<Begun> begun = Begun{std::move(flight_->request), flight_->use, flight_->was_overdue};
  if (flight_->forgotten) begun.reset();
  flight_.reset();
  return begun;
}

bool StandingCalls::on_call_failed(std::uint64_t call, Discards& discards) {
  const StandingUse failed = use_of_call(call);
  return on_ended({failed.number, failed.use + 1}, discards);
}

std::optional<StandingUse> StandingCalls::ask(CacheId id) {
  Standing* standing = find(id);
  if (standing == nullptr) return std::nullopt;
  return StandingUse{standing->response.standing, standing->asked++};
}

StandingUse StandingCalls::take_overdue() {
  flight_->overdue_at = kNever;
  flight_->was_overdue = true;
  return flight_->use;
}

void StandingCalls::forget(CacheId id) {
  const auto number = numbers_.find(id);
  if (number == numbers_.end()) return;
  standing_.erase(number->second);
  numbers_.erase(number);
}

void StandingCalls::forget_set(ProcessSetId process_set) {
  std::erase_if(standing_, [&](const auto& one) {
    if (one.second.response.process_set != process_set) return false;
    numbers_.erase(one.second.response.entries.front().cache_id);
    return true;
  });
  if (!flight_ || flight_->process_set != process_set) return;
  flight_->forgotten = true;
  flight_->overdue_at = kNever;
}

}  // namespace hvd
