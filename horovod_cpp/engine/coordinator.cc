#include "horovod_cpp/engine/coordinator.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "common/rank_text.h"
#include "horovod_cpp/engine/standing_calls.h"
#include "ops/collective_context.h"

namespace hvd {
namespace {

std::vector<int> without(const std::vector<int>& ranks, const std::set<int>& gone) {
  std::vector<int> rest;
  std::copy_if(ranks.begin(), ranks.end(), std::back_inserter(rest), [&](int rank) { return !gone.contains(rank); });
  return rest;
}

std::vector<int> to_ranks(const Shape& shape) {
  std::vector<int> ranks;
  for (const std::int64_t rank : shape) ranks.push_back(static_cast<int>(rank));
  return ranks;
}

// Few ranks of one host: there, each may deal with all others at once.
bool is_close(const Membership& membership) {
  constexpr int most = 8;
  return membership.size() > 1 && membership.size() <= most && membership.on_one_host();
}

// At most two letters more, less or other (Levenshtein distance, by the usual row after row).
bool are_nearly_equal(const std::string& a, const std::string& b) {
  constexpr std::size_t most = 2;
  constexpr std::size_t shortest = 4;  // below, everything is near
  constexpr std::size_t longest = 300;
  if (std::min(a.size(), b.size()) < shortest || std::max(a.size(), b.size()) > longest) return false;
  if (is_generated_name(a) || is_generated_name(b)) return false;
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t k = 1; k <= b.size(); ++k) {
      const std::size_t changed = diagonal + (a[i - 1] == b[k - 1] ? 0 : 1);
      diagonal = row[k];
      row[k] = std::min({changed, row[k] + 1, row[k - 1] + 1});
    }
  }
  return row.back() <= most;
}

}  // namespace

Coordinator::Coordinator(MembershipRef everyone, CoordinatorSettings settings)
    : everyone_(std::move(everyone)), settings_(settings), sets_(everyone_) {}

std::string Coordinator::call_site_text(int rank, std::uint32_t call_site) const {
  const auto found = call_sites_.find({rank, call_site});
  return found == call_sites_.end() ? std::string() : found->second;
}

void Coordinator::on_requests(int rank, RequestsMessage message, TimePoint now, Outbox& out) {
  take_standing_uses(rank, message, now, out);
  for (CallSiteDefinition& site : message.call_sites) call_sites_[{rank, site.id}] = std::move(site.text);
  for (Request& request : message.requests) take_request(rank, std::move(request), now, out);
  for (const CacheId id : message.cached) take_cached(rank, id, now);
  if (message.forgotten > 0) forgotten_[rank] -= std::min(forgotten_[rank], message.forgotten);
  if (!joining_.empty()) take_joins(now);
}

void Coordinator::take_request(int rank, Request request, TimePoint now, Outbox& out) {
  if (ended_) return;
  const OperationKey key = request.key;
  const MembershipRef membership = sets_.find(key.process_set);
  const std::optional<int> index = membership ? membership->index_of(rank) : std::nullopt;
  if (!index || find_op_rule(key.op) == nullptr) {
    send_to({rank},
            error_response(key, StatusCode::kPrecondition,
                           fmt::format("{} '{}': process set {} does not exist or rank {} is not in it",
                                       name_of(key.op), key.name, key.process_set, rank)),
            out);
    return;
  }
  if (const Status& failure = sets_.failure(key.process_set); !failure.ok()) {
    send_to({rank}, error_response(key, failure.code(), failure.text()), out);
    return;
  }
  if (request.device >= 0) last_devices_[rank] = request.device;
  readiness_.add_full(membership, *index, std::move(request), now);
  if (is_on(settings_.timeline)) settings_.timeline->rank_ready(key, rank);
  if (key.op == OpKind::kJoin) joining_.insert(rank);
  if (is_ready(key)) settle(key, now);
}

// A rank that has joined is missed by nobody: what waited for it alone goes on. Its join counts when all that it asked
// for before is here.
void Coordinator::take_joins(TimePoint now) {
  for (auto rank = joining_.begin(); rank != joining_.end();) {
    if (forgotten_[*rank] > 0) {
      ++rank;
      continue;
    }
    last_joined_ = *rank;
    joined_.insert(*rank);
    rank = joining_.erase(rank);
  }
  for (const OperationKey& key : readiness_.waiting()) {
    if (key.op != OpKind::kJoin && is_ready(key)) settle(key, now);
  }
  const OperationKey join{0, OpKind::kJoin, std::string(kJoinName)};
  if (is_ready(join)) settle(join, now);
}

bool Coordinator::is_ready(const OperationKey& key) const {
  if (key.op == OpKind::kJoin) return static_cast<int>(joined_.size()) == everyone_->size();
  const ReadinessTable::Pending* pending = readiness_.find(key);
  if (pending == nullptr) return false;
  const int missing = pending->membership->size() - pending->asked;
  // Counted only where it may be enough: with many ranks it takes long.
  return missing == 0 ||
         (missing <= static_cast<int>(joined_.size()) && missing == static_cast<int>(joined_missing(*pending).size()));
}

std::vector<int> Coordinator::really_missing(const ReadinessTable::Pending& pending) const {
  return without(pending.missing(), joined_);
}

std::vector<int> Coordinator::joined_missing(const ReadinessTable::Pending& pending) const {
  std::vector<int> ranks = pending.missing();
  std::erase_if(ranks, [this](int rank) { return !joined_.contains(rank); });
  return ranks;
}

// An id that is not known here was forgotten while it was on its way: its sender will read that in the stream and
// send the request in full.
void Coordinator::take_cached(int rank, CacheId id, TimePoint now) {
  if (ended_) return;
  const ResponseCache::Entry* known = cache_.find(id);
  if (known == nullptr) {
    ++forgotten_[rank];
    return;
  }
  const OperationKey key = known->agreed.key;
  const MembershipRef membership = sets_.find(key.process_set);
  const std::optional<int> index = membership ? membership->index_of(rank) : std::nullopt;
  if (!index || !sets_.failure(key.process_set).ok()) return;
  readiness_.add_cached(membership, *index, key, id, now);
  if (is_on(settings_.timeline)) settings_.timeline->rank_ready(key, rank);
  if (is_ready(key)) settle(key, now);
}

void Coordinator::settle(const OperationKey& key, TimePoint now) {
  const ReadinessTable::Pending pending = readiness_.take(key);
  if (const std::vector<int> joined = joined_missing(pending);
      !joined.empty() && !find_op_rule(key.op)->runs_with_joined) {
    ready_.push_back(
        {error_response(
             key, StatusCode::kPrecondition,
             fmt::format("{} '{}': {} joined, having no more data; only allreduce and barrier go on without "
                         "the ranks that have joined (a sparse gradient is gathered unless DistributedOptimizer has "
                         "sparse_as_dense=True)",
                         name_of(key.op), key.name, rank_text(joined) + (joined.size() > 1 ? " have" : " has"))),
         now});
    note_answer(pending);
    return;
  }
  Agreement agreement =
      agree(key, pending, cache_, [this](int rank, std::uint32_t site) { return call_site_text(rank, site); });
  if (agreement.response.kind == Response::Kind::kExecute) {
    settle_process_set(agreement.response, agreement.agreed);
    choose_devices_of_joined(agreement.response);
    remember(agreement);
  }
  if (key.op == OpKind::kJoin) {
    agreement.response.root_rank = last_joined_;
    joined_.clear();
  }
  ready_.push_back({std::move(agreement.response), now + settings_.company_time});
  note_answer(pending);
}

// Where a rank that has joined would have the tensors: as before, so that the call takes what is there for it.
void Coordinator::choose_devices_of_joined(Response& response) const {
  if (response.kind != Response::Kind::kExecute || response.entries.front().devices.empty() || joined_.empty()) return;
  ResponseEntry& entry = response.entries.front();
  const MembershipRef membership = sets_.find(response.process_set);
  const ResponseCache::Entry* before = cache_.find({response.process_set, response.op, entry.name});
  for (int index = 0; index < membership->size(); ++index) {
    std::int64_t& device = entry.devices[static_cast<std::size_t>(index)];
    if (device >= 0) continue;
    if (before != nullptr) device = device_of(before->entry, index);
    const auto last = last_devices_.find(membership->ranks[static_cast<std::size_t>(index)]);
    if (device < 0 && last != last_devices_.end()) device = last->second;
  }
}

// The last one that became ready.
void Coordinator::note_answer(const ReadinessTable::Pending& pending) const {
  if (!is_on(settings_.timeline)) return;
  settings_.timeline->answered(ready_.back().response, pending.membership->contains(everyone_->first()));
}

void Coordinator::settle_process_set(Response& response, const Request& agreed) {
  if (response.op == OpKind::kProcessSetAdd) {
    const std::vector<int> ranks = to_ranks(agreed.shape);
    if (const std::optional<ProcessSetId> known = sets_.id_of(ranks)) {
      response =
          error_response(agreed.key, StatusCode::kInvalidArgument,
                         fmt::format("a process set with {} exists already: its id is {}", rank_text(ranks), *known));
      return;
    }
    response.new_process_set = sets_.next_id();
    sets_.add(response.new_process_set, ranks);
  } else if (response.op == OpKind::kProcessSetRemove) {
    const auto id = static_cast<ProcessSetId>(agreed.shape.front());
    // What is agreed and not yet sent would have no receivers any more.
    const bool held =
        std::any_of(ready_.begin(), ready_.end(), [id](const Held& one) { return one.response.process_set == id; });
    if (sets_.find(id) == nullptr || held || !readiness_.waiting_in(id).empty()) {
      response = error_response(agreed.key, StatusCode::kInvalidArgument,
                                fmt::format("process set {} cannot be removed: it {}", id,
                                            sets_.find(id) == nullptr ? "does not exist" : "has operations waiting"));
      return;
    }
    response.new_process_set = id;
    sets_.remove(id);
    cache_.forget_set(id);
  }
}

void Coordinator::remember(Agreement& agreement) {
  if (agreement.repeated != 0) {
    cache_.touch(agreement.repeated);
    return;
  }
  const OpRule& rule = *find_op_rule(agreement.response.op);
  if (is_generated_name(agreement.agreed.key.name)) return;
  if (!rule.cacheable || settings_.cache_capacity == 0 || agreement.response.kind != Response::Kind::kExecute) return;
  ResponseEntry& entry = agreement.response.entries.front();
  entry.cache_id = next_cache_id_++;
  cache_.remember({entry.cache_id, agreement.agreed, entry});
}

Coordinator::Standing* Coordinator::standing(StandingNumber number) {
  return number == 0 || number > standing_.size() ? nullptr : &standing_[number - 1u];
}

void Coordinator::end_standing(const Standing& ended) {
  constexpr int most = 1 << 20;
  ResponseCache::Entry* entry = cache_.edit(ended.id);
  if (entry == nullptr || standing(entry->standing) != &ended || !std::exchange(entry->stands, false)) return;
  entry->alone_in_a_row = 0;
  entry->wanted_in_a_row = std::min(2 * entry->wanted_in_a_row, most);  // it was not as steady as it looked
}

// What a member says of a standing response is for the others.
void Coordinator::take_standing_uses(int rank, RequestsMessage& message, TimePoint now, Outbox& out) {
  const auto tell = [&](const StandingUse& said, std::vector<StandingUse> ResponsesMessage::* where) {
    const Standing* known = standing(said.number);
    const MembershipRef membership = known == nullptr ? nullptr : sets_.find(known->key.process_set);
    if (!membership || !membership->contains(rank)) return;
    for (const int peer : without(membership->ranks, lost_)) {
      if (peer != rank) (out.responses[peer].*where).push_back(said);
    }
  };
  for (const StandingUse& said : message.overdue) {
    tell(said, &ResponsesMessage::overdue);
    if (Standing* known = standing(said.number)) known->overdue[rank] = now;
  }
  for (const StandingUse& said : message.ended) {
    tell(said, &ResponsesMessage::ended);
    if (Standing* known = standing(said.number)) {
      known->overdue.erase(rank);
      end_standing(*known);
    }
  }
  if (!message.asked.empty()) refuse_failed_uses(rank, message, out);
}

// The ranks that wait in a use, as if they had asked for it: the others have not begun it, or do not answer.
std::optional<ReadinessTable::Pending> Coordinator::waiting_in_use(const Standing& standing) const {
  const MembershipRef membership = standing.overdue.empty() ? nullptr : sets_.find(standing.key.process_set);
  if (!membership) return std::nullopt;
  ReadinessTable::Pending pending;
  pending.membership = membership;
  pending.since = kNever;
  pending.has_asked.resize(static_cast<std::size_t>(membership->size()));
  for (const auto& [rank, since] : standing.overdue) {
    const std::optional<int> index = membership->index_of(rank);
    if (!index) continue;
    pending.has_asked[static_cast<std::size_t>(*index)] = true;
    ++pending.asked;
    pending.since = std::min(pending.since, since);
  }
  return pending;
}

std::map<OperationKey, ReadinessTable::Pending> Coordinator::waiting_in_uses() const {
  std::map<OperationKey, ReadinessTable::Pending> waiting;
  for (const Standing& one : standing_) {
    if (std::optional<ReadinessTable::Pending> pending = waiting_in_use(one)) waiting[one.key] = std::move(*pending);
  }
  return waiting;
}

// A rank on which a use has failed goes on to its next one: what others still ask for the failed one gets the failure.
void Coordinator::refuse_failed_uses(int rank, RequestsMessage& message, Outbox& out) {
  for (const StandingUse& use : message.asked) {
    Standing* known = standing(use.number);
    if (known == nullptr) continue;
    known->overdue.erase(rank);  // it waits for the answer now
    known->asked[rank] = use.use;
    if (known->failed != use.use) continue;
    std::erase_if(message.requests, [&](const Request& request) { return request.key == known->key; });
    std::erase_if(message.cached, [&](CacheId id) {
      const ResponseCache::Entry* entry = cache_.find(id);
      return entry != nullptr && entry->agreed.key == known->key;
    });
    send_to({rank}, error_response(known->key, StatusCode::kInternal, known->failure), out);
  }
}

// What is agreed on alone, with nothing else in sight, again and again, need not be asked for any more.
void Coordinator::let_stand(std::vector<Response>& agreed) {
  if (settings_.standing_after == 0) return;
  const bool alone = agreed.size() == 1 && readiness_.empty() && in_flight_ == 0 && joining_.empty() && joined_.empty();
  for (Response& response : agreed) {
    ResponseCache::Entry* entry = may_stand(response) ? cache_.edit(response.entries.front().cache_id) : nullptr;
    const MembershipRef membership = sets_.find(response.process_set);
    if (entry == nullptr || !membership || !is_close(*membership)) continue;
    if (Standing* before = standing(entry->standing)) {  // all have asked for what came after it
      before->asked.clear();
      before->failed.reset();
      entry->standing = 0;
    }
    if (entry_bytes(response, response.entries.front()) > settings_.standing_limit_bytes) continue;
    if (entry->wanted_in_a_row == 0) entry->wanted_in_a_row = settings_.standing_after;
    entry->alone_in_a_row = alone ? entry->alone_in_a_row + 1 : 0;
    if (entry->alone_in_a_row < entry->wanted_in_a_row || standing_.size() >= kMostStanding) continue;
    standing_.emplace_back();
    standing_.back().id = entry->id;
    standing_.back().key = entry->agreed.key;
    entry->standing = response.standing = static_cast<StandingNumber>(standing_.size());
    entry->stands = true;
  }
}

// Forgets the oldest responses, but never one that somebody has asked for by its id, nor one that is yet to be sent:
// its receivers would remember it after they were told to forget it.
void Coordinator::make_room(Outbox& out) {
  if (cache_.size() <= settings_.cache_capacity) return;
  for (const CacheId id : cache_.oldest(cache_.size() - settings_.cache_capacity)) {
    const ResponseCache::Entry& entry = *cache_.find(id);
    // What stood is kept until all have asked again: until then its number tells which use a request is.
    if (readiness_.find(entry.agreed.key) != nullptr || entry.standing != 0) continue;
    const bool held = std::any_of(ready_.begin(), ready_.end(),
                                  [&](const Held& one) { return one.response.entries.front().cache_id == id; });
    if (held) continue;
    const MembershipRef membership = sets_.find(entry.agreed.key.process_set);
    for (const int rank : without(membership->ranks, lost_)) out.responses[rank].evicted.push_back(id);
    cache_.forget(id);
  }
}

bool Coordinator::company_is_over(TimePoint now) const {
  if (in_flight_ == 0) return true;
  return std::any_of(ready_.begin(), ready_.end(),
                     [&](const Held& held) { return held.until <= now || !may_fuse(held.response, settings_.fusion); });
}

void Coordinator::flush(TimePoint now, Outbox& out) {
  check_stalls(now, out);
  if (!ready_.empty() && company_is_over(now)) {
    std::vector<Response> agreed;
    for (Held& held : std::exchange(ready_, {})) agreed.push_back(std::move(held.response));
    let_stand(agreed);
    for (Response& call : plan_fusion(std::move(agreed), settings_.fusion)) send(std::move(call), out);
  }
  make_room(out);
}

TimePoint Coordinator::next_deadline() const {
  TimePoint next = kNever;
  for (const Held& held : ready_) next = std::min(next, held.until);
  if (settings_.stall_shutdown_time > Duration::zero() && !ended_) {
    TimePoint oldest = readiness_.oldest();
    for (const auto& [key, pending] : waiting_in_uses()) oldest = std::min(oldest, pending.since);
    if (oldest != kNever) next = std::min(next, oldest + settings_.stall_shutdown_time + Duration(1));
  }
  return next;
}

void Coordinator::send(Response response, Outbox& out) {
  // A set that was removed by this very response is addressed through the set that asked for it.
  const MembershipRef membership = sets_.find(response.process_set);
  if (!membership) return;
  if (response.kind == Response::Kind::kExecute) response.call = calls_[response.process_set]++;
  send_to(without(membership->ranks, lost_), response, out);
}

void Coordinator::send_to(const std::vector<int>& ranks, const Response& response, Outbox& out) {
  for (const int rank : ranks) {
    ResponsesMessage& message = out.responses[rank];
    for (const ResponseEntry& entry : response.entries) {
      const ResponseCache::Entry* known = entry.cache_id == 0 ? nullptr : cache_.find(entry.cache_id);
      // The first time, the entry travels whole and is remembered from it; then its id is enough.
      message.as_cache_id.push_back(known != nullptr && known->entry.cache_id == entry.cache_id && known->announced);
    }
    message.responses.push_back(response);
  }
  for (const ResponseEntry& entry : response.entries) {
    if (entry.cache_id != 0) cache_.mark_announced(entry.cache_id);
  }
}

void Coordinator::end_job(StatusCode code, const std::string& text, Outbox& out) {
  if (std::exchange(ended_, true)) return;
  Response response;
  response.kind = Response::Kind::kShutdown;
  response.error_code = code;
  response.error = text;
  send_to(without(everyone_->ranks, lost_), response, out);
}

void Coordinator::on_shutdown(int rank, Outbox& out) {
  for (Held& held : std::exchange(ready_, {})) send(std::move(held.response), out);
  end_job(StatusCode::kInternal,
          fmt::format("Horovod has been shut down. Rank {} called shutdown() or ended while operations were waiting "
                      "on other ranks; look for the first error in its output.",
                      rank),
          out);
}

void Coordinator::on_peer_lost(int rank, const std::string& reason, Outbox& out) {
  if (!lost_.insert(rank).second) return;
  const std::string text = reason.empty() ? fmt::format("rank {} is lost", rank) : reason;
  sets_.fail_sets_with(rank, Status::internal(text));
  // The set of all ranks has failed, and with it every join.
  joining_.clear();
  joined_.clear();
  for (Standing& one : standing_) {
    const MembershipRef membership = sets_.find(one.key.process_set);
    if (!membership || membership->contains(rank)) one.overdue.clear();
  }
  const std::vector<std::byte> message = encode(PeerLostMessage{rank, text});
  for (const int peer : without(everyone_->ranks, lost_)) out.messages.emplace_back(peer, message);
  for (const ProcessSetId id : sets_.ids_with(rank)) {
    for (const OperationKey& key : readiness_.waiting_in(id)) readiness_.take(key);
    std::erase_if(ready_, [&](const Held& held) { return held.response.process_set == id; });
  }
}

void Coordinator::on_call_failed(int rank, const CallFailedMessage& message, Outbox& out) {
  if (is_standing_call(message.call)) fail_standing_use(message, out);
  // A set that has been removed may have calls in flight; ranks that were not in it have no such call.
  const MembershipRef known = sets_.find(message.process_set);
  const MembershipRef membership = known ? known : everyone_;
  const std::vector<std::byte> bytes = encode(message);
  for (const int peer : without(membership->ranks, lost_)) {
    if (peer != rank) out.messages.emplace_back(peer, bytes);
  }
}

void Coordinator::fail_standing_use(const CallFailedMessage& message, Outbox& out) {
  const StandingUse use = use_of_call(message.call);
  Standing* known = standing(use.number);
  if (known == nullptr || known->failed) return;
  end_standing(*known);
  known->overdue.clear();
  known->failed = use.use;
  known->failure = operation_text(known->key) + ": " + message.text;
  const MembershipRef membership = sets_.find(known->key.process_set);
  for (const auto& [rank, asked] : known->asked) {
    const std::optional<int> index = membership ? membership->index_of(rank) : std::nullopt;
    if (asked != use.use || !index || !readiness_.withdraw(known->key, *index)) continue;
    send_to({rank}, error_response(known->key, StatusCode::kInternal, known->failure), out);
  }
}

StallReportMessage Coordinator::on_stall_query(int /*rank*/, const StallQueryMessage& query) const {
  StallReportMessage report;
  const std::map<OperationKey, ReadinessTable::Pending> in_uses = waiting_in_uses();
  for (const OperationKey& key : query.keys) {
    const ReadinessTable::Pending* pending = readiness_.find(key);
    if (const auto in_use = in_uses.find(key); pending == nullptr && in_use != in_uses.end()) pending = &in_use->second;
    if (pending == nullptr) continue;
    const std::vector<int> missing = really_missing(*pending);
    report.lines.push_back({key, {missing.begin(), missing.end()}, hint(key, *pending)});
  }
  return report;
}

// The likely mistakes: another operation under the same name, nearly the same name, a loop that has ended, another
// operation. What does not need the name of `key` leaves it out: a report tells it once for all that waits.
std::string Coordinator::hint(const OperationKey& key, const ReadinessTable::Pending& pending) const {
  constexpr int most = 3;
  constexpr std::string_view end_of_loop = "as after the end of a loop: do all ranks have as much data?";
  const std::vector<int> missing = really_missing(pending);
  std::vector<std::string> texts;
  int others = 0;
  for (const OperationKey& other : readiness_.waiting()) {
    if (other.process_set != key.process_set || other == key) continue;
    std::vector<int> ranks = readiness_.find(other)->present();
    const auto asked = ranks.size();
    std::erase_if(ranks, [&](int rank) { return !std::binary_search(missing.begin(), missing.end(), rank); });
    if (ranks.empty()) continue;
    const bool nobody_asked_for_both = ranks.size() == asked;
    const std::string asked_for = fmt::format("{} asked for {} '{}'", rank_text(ranks), name_of(other.op), other.name);
    const auto mistaken = [&](std::string_view why) {
      return fmt::format("{} '{}' waits for {}, while {} ({})", name_of(key.op), key.name, rank_text(missing),
                         asked_for, why);
    };
    if (nobody_asked_for_both && other.name == key.name) {
      texts.push_back(mistaken("another operation under the same name"));
    } else if (nobody_asked_for_both && other.op == key.op && are_nearly_equal(other.name, key.name)) {
      texts.push_back(mistaken("a name that is nearly the same"));
    } else if (other.op == OpKind::kBarrier) {
      texts.push_back(fmt::format("{} ({})", asked_for, end_of_loop));
    } else if (nobody_asked_for_both && ++others <= most) {
      texts.push_back(asked_for + ", and no other rank did");
    }
  }
  if (others > most) texts.push_back(fmt::format("and for {} more of this kind", others - most));
  if (const std::vector<int> silent = silent_among(missing); !silent.empty()) {
    texts.push_back(fmt::format("{} asked for nothing ({})", rank_text(silent), end_of_loop));
  }
  return fmt::format("{}", fmt::join(texts, "; "));
}

// Those for whom nobody waits but those that wait for them: they have asked for nothing, in any set.
std::vector<int> Coordinator::silent_among(std::vector<int> ranks) const {
  const auto strike = [&](const std::vector<int>& present) {
    std::erase_if(ranks, [&](int rank) { return std::find(present.begin(), present.end(), rank) != present.end(); });
  };
  for (const OperationKey& key : readiness_.waiting()) strike(readiness_.find(key)->present());
  for (const auto& [key, pending] : waiting_in_uses()) strike(pending.present());
  return ranks;
}

void Coordinator::check_stalls(TimePoint now, Outbox& out) {
  if (settings_.stall_shutdown_time <= Duration::zero() || ended_) return;
  const TimePoint limit = now - settings_.stall_shutdown_time;
  std::vector<OperationKey> stalled = readiness_.waiting_since_before(limit);
  const std::map<OperationKey, ReadinessTable::Pending> in_uses = waiting_in_uses();
  for (const auto& [key, pending] : in_uses) {
    if (pending.since < limit && readiness_.find(key) == nullptr) stalled.push_back(key);
  }
  if (stalled.empty()) return;
  const OperationKey& first = stalled.front();
  const ReadinessTable::Pending* asked = readiness_.find(first);
  const std::vector<int> missing = really_missing(asked != nullptr ? *asked : in_uses.at(first));
  end_job(StatusCode::kInternal,
          fmt::format("{} '{}' has waited for {} for longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS; {} operation(s) "
                      "were stalled and the job ends",
                      name_of(first.op), first.name, rank_text(missing), stalled.size()),
          out);
}

}  // namespace hvd
