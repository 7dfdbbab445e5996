#include "horovod_cpp/engine/controller.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "horovod_cpp/engine/op_rules/attributes.h"
#include "ops/collective_context.h"

namespace hvd {

Controller::Controller(int rank, ProcessSetTable& sets, CoordinatorSettings settings) : rank_(rank), sets_(sets) {
  if (rank == sets.everyone()->first()) coordinator_ = std::make_unique<Coordinator>(sets.everyone(), settings);
}

void Controller::add_process_set(ProcessSetId id, const std::vector<int>& ranks) {
  sets_.add(id, ranks);
  if (is_coordinator()) coordinator_->add_process_set(id, ranks);
}

Actions Controller::on_event(const Event& event, TimePoint now) {
  std::visit([&](const auto& one) { handle(one, now); }, event);
  if (is_coordinator()) distribute(now);
  actions_.look_again = std::min(actions_.look_again, standing_.next_deadline());
  return std::exchange(actions_, {});
}

// ---- the worker -----------------------------------------------------------------------------------------------------

void Controller::handle(const RequestsEnqueued& event, TimePoint now) {
  RequestsMessage message;
  message.call_sites = event.call_sites;
  const bool alone = event.requests.size() == 1 && sent_as_id_.empty() && sent_whole_.empty() && held_back_.empty();
  for (const Request& request : event.requests) {
    // Handed over while the set was failing: nobody will answer it.
    if (const Status& failure = sets_.failure(request.key.process_set); !failure.ok()) {
      actions_.responses.push_back(error_response(request.key, failure.code(), failure.text()));
      continue;
    }
    if (waits_for_standing(message, request)) {
      held_back_.push_back(request);
      continue;
    }
    const std::optional<CacheId> id = cached_id(request);
    if (id && alone && standing_.may_begin(*id)) {
      cache_hits_.add(1);
      actions_.responses.push_back(standing_.begin(*id, request, now, actions_.discards));
      continue;
    }
    if (const ResponseCache::Entry* known = cache_.find(request.key)) {
      if (const std::optional<StandingUse> ended = standing_.end(known->id, actions_.discards)) {
        message.ended.push_back(*ended);
      }
      if (const std::optional<StandingUse> use = standing_.ask(known->id)) message.asked.push_back(*use);
    }
    ask(message, id, request);
  }
  submit(std::move(message), now);
}

std::optional<CacheId> Controller::cached_id(const Request& request) const {
  const MembershipRef membership = sets_.find(request.key.process_set);
  const std::optional<int> index = membership ? membership->index_of(rank_) : std::nullopt;
  return index ? cache_.id_for(request, *index) : std::nullopt;
}

void Controller::ask(RequestsMessage& message, std::optional<CacheId> id, const Request& request) {
  if (id) {
    cache_hits_.add(1);
    sent_as_id_[*id] = request;
    message.cached.push_back(*id);
  } else {
    sent_whole_[request.key] = request;
    message.requests.push_back(request);
  }
}

// Who joins, or asks for the end of a set, begins no standing call after it, and has none in flight when it asks: what
// it has begun has then ended, or is negotiated before.
bool Controller::waits_for_standing(RequestsMessage& message, const Request& request) {
  std::vector<StandingUse> ended;
  if (request.key.op == OpKind::kJoin) {
    ended = standing_.end_all(actions_.discards);
  } else if (request.key.op == OpKind::kProcessSetRemove) {
    ended = standing_.end_set(static_cast<ProcessSetId>(request.shape.front()), actions_.discards);
  } else {
    return false;
  }
  message.ended.insert(message.ended.end(), ended.begin(), ended.end());
  return standing_.in_flight();
}

void Controller::submit(RequestsMessage message, TimePoint now) {
  if (message.is_empty()) return;
  if (is_coordinator()) {
    coordinator_->on_requests(rank_, std::move(message), now, outbox_);
  } else if (!lost_.contains(coordinator_rank())) {
    to_coordinator(message);
  }
}

template <typename Message>
void Controller::to_coordinator(const Message& message) {
  actions_.messages.emplace_back(coordinator_rank(), encode(message));
}

void Controller::follow(ResponsesMessage message, TimePoint now) {
  RequestsMessage again;
  for (const StandingUse& said : message.ended) {
    if (standing_.on_ended(said, actions_.discards)) withdraw_standing();
  }
  for (const StandingUse& said : message.overdue) {
    const std::optional<StandingUse> ended = standing_.on_overdue(said, actions_.discards);
    if (ended) again.ended.push_back(*ended);
  }
  std::size_t place = 0;
  for (Response& response : message.responses) {
    bool known = true;
    for (ResponseEntry& entry : response.entries) {
      if (!complete_entry(response, entry, message.as_cache_id[place++])) known = false;
    }
    if (!known || !can_apply(response)) {  // only a coordinator that breaks the rules sends such a thing
      lose_peer(coordinator_rank(),
                fmt::format("rank {} (coordinator) sent a response that cannot be understood", coordinator_rank()));
      return;
    }
    apply(response);
    if (response.kind == Response::Kind::kExecute) {
      for (const ResponseEntry& entry : response.entries) standing_.forget(entry.cache_id);  // all have asked again
    }
    if (response.standing != 0) standing_.grant(response);
    actions_.responses.push_back(std::move(response));
  }
  for (const CacheId id : message.evicted) {
    cache_.forget(id);
    standing_.forget(id);
    const auto sent = sent_as_id_.find(id);
    if (sent == sent_as_id_.end()) continue;
    sent_whole_[sent->second.key] = sent->second;
    again.requests.push_back(std::move(sent->second));
    ++again.forgotten;
    sent_as_id_.erase(sent);
  }
  again.forgotten += std::exchange(given_up_, 0);
  submit(std::move(again), now);
}

// Fills in what travels as an id, and remembers what travels whole for the first time.
bool Controller::complete_entry(const Response& response, ResponseEntry& entry, bool as_cache_id) {
  if (as_cache_id) {
    const ResponseCache::Entry* known = cache_.find(entry.cache_id);
    if (known == nullptr) return false;
    entry = known->entry;
    cache_.touch(entry.cache_id);
    sent_as_id_.erase(entry.cache_id);
    return true;
  }
  if (!is_sound(response, entry)) return false;
  const OperationKey key{response.process_set, response.op, entry.name};
  const ResponseCache::Entry* replaced = cache_.find(key);
  if (replaced != nullptr) {
    sent_as_id_.erase(replaced->id);
    standing_.forget(replaced->id);
  }
  sent_whole_.erase(key);
  if (entry.cache_id != 0) {
    Request agreed;
    agreed.key = key;
    agreed.dtype = response.dtype;
    agreed.reduce_op = response.reduce_op;
    agreed.prescale = response.prescale;
    agreed.postscale = response.postscale;
    agreed.root_rank = response.root_rank;
    agreed.memory = response.memory;
    agreed.shape = entry.shape;
    agreed.more = entry.more;
    agreed.order = entry.order;
    agreed.is_complex = entry.is_complex;
    cache_.remember({entry.cache_id, std::move(agreed), entry});
  }
  return true;
}

// Whether the entry can be what the members of its set agreed on: what comes later trusts its types and counts.
bool Controller::is_sound(const Response& response, const ResponseEntry& entry) const {
  const bool of_ranks = response.op == OpKind::kProcessSetAdd || response.op == OpKind::kProcessSetRemove;
  if (response.kind != Response::Kind::kExecute || of_ranks) return true;
  const MembershipRef membership = sets_.find(response.process_set);
  const std::size_t ranks = membership ? membership->ranks.size() : 0;
  const bool on_devices = response.memory != MemoryKind::kHost;
  bool sound = response.memory <= MemoryKind::kDeviceCaptured && entry.devices.size() == (on_devices ? ranks : 0);
  bool has_scalar = false;
  for_each_tensor(response, entry, [&](DataType dtype, const Shape& shape) {
    if (!attributes::check_tensor(dtype, shape).ok()) sound = false;
    if (shape.empty()) has_scalar = true;
  });
  if (response.op != OpKind::kAllgather) return sound;
  return sound && !has_scalar && membership && entry.first_dims.size() == (1 + entry.more.size()) * ranks;
}

// Whether the response names something, a process set that is to go is there, and a new one has an id of its own and
// ranks of this job.
bool Controller::can_apply(const Response& response) const {
  if (response.kind != Response::Kind::kExecute) return response.standing == 0;
  if (response.entries.empty() || is_standing_call(response.call)) return false;
  if (response.standing != 0 && !may_stand(response)) return false;
  if (response.op == OpKind::kProcessSetRemove) {
    return response.new_process_set != 0 && sets_.find(response.new_process_set) != nullptr;
  }
  if (response.op != OpKind::kProcessSetAdd) return true;
  const Shape& ranks = response.entries.front().shape;
  const auto exists = [&](std::int64_t rank) {
    return rank == static_cast<int>(rank) && sets_.everyone()->contains(static_cast<int>(rank));
  };
  const bool ascending = std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) == ranks.end();
  return !ranks.empty() && ascending && std::all_of(ranks.begin(), ranks.end(), exists) &&
         sets_.find(response.new_process_set) == nullptr;
}

void Controller::apply(const Response& response) {
  if (response.kind == Response::Kind::kShutdown) {
    ended_ = true;
  } else if (response.kind == Response::Kind::kExecute && response.op == OpKind::kProcessSetAdd) {
    std::vector<int> ranks;
    for (const std::int64_t rank : response.entries.front().shape) ranks.push_back(static_cast<int>(rank));
    sets_.add(response.new_process_set, ranks);
    for (const int rank : lost_) {
      if (sets_.find(response.new_process_set)->contains(rank)) {
        sets_.fail_sets_with(rank, Status::internal(fmt::format("rank {} is lost", rank)));
      }
    }
  } else if (response.kind == Response::Kind::kExecute && response.op == OpKind::kProcessSetRemove) {
    const ProcessSetId removed = response.new_process_set;
    sets_.remove(removed);
    cache_.forget_set(removed);
    standing_.forget_set(removed);
    // The coordinator has forgotten these ids as well: nobody will answer what is on its way as one of them.
    std::erase_if(sent_as_id_, [&](const auto& sent) {
      const OperationKey& key = sent.second.key;
      if (key.process_set != removed) return false;
      ++given_up_;
      actions_.responses.push_back(
          error_response(key, StatusCode::kPrecondition,
                         fmt::format("{} '{}': process set {} has been removed", name_of(key.op), key.name, removed)));
      return true;
    });
  }
}

void Controller::handle(const PeerLost& event, TimePoint /*now*/) { lose_peer(event.rank, event.reason.text()); }

// Told by a transport or by the coordinator. Sets without that rank go on, as long as the coordinator is there.
void Controller::lose_peer(int rank, const std::string& text) {
  if (ended_ || rank == rank_ || !lost_.insert(rank).second) return;
  const Status reason = Status::internal(text);
  const bool coordinator = rank == coordinator_rank();
  actions_.lost_ranks.push_back({rank, reason});
  for (const ProcessSetId id : coordinator ? sets_.ids() : sets_.ids_with(rank)) {
    sets_.fail(id, reason);
    standing_.forget_set(id);
    actions_.failed_sets.push_back({id, reason});
    std::erase_if(sent_whole_, [&](const auto& sent) { return sent.first.process_set == id; });
    std::erase_if(sent_as_id_, [&](const auto& sent) { return sent.second.key.process_set == id; });
  }
  if (is_coordinator()) {
    coordinator_->on_peer_lost(rank, text, outbox_);
  } else if (!coordinator) {
    to_coordinator(PeerLostMessage{rank, text});
  }
}

void Controller::handle(const ShutdownWanted& /*event*/, TimePoint now) {
  if (ended_) return;
  RequestsMessage farewell;
  farewell.ended = standing_.end_all(actions_.discards);
  submit(std::move(farewell), now);
  if (is_coordinator()) {
    coordinator_->on_shutdown(rank_, outbox_);
  } else if (lost_.contains(coordinator_rank())) {
    ended_ = true;
  } else {
    actions_.messages.emplace_back(coordinator_rank(), encode_shutdown());
  }
}

void Controller::withdraw_standing() {
  const auto [process_set, call] = standing_.call();
  actions_.withdrawn.push_back({process_set, call});
}

// One that was withdrawn is asked for in the old way; what had to wait for it is asked for after it.
void Controller::end_standing_flight(const CallEnded& event, TimePoint now) {
  const std::optional<StandingCalls::Begun> begun = standing_.on_call_ended(event.call);
  if (!event.status.ok()) standing_.on_call_failed(event.call, actions_.discards);
  RequestsMessage message;
  if (begun && event.withdrawn && sets_.failure(begun->request.key.process_set).ok()) {
    message.asked.push_back(begun->use);
    ask(message, cached_id(begun->request), begun->request);
  } else if (begun && begun->was_overdue && event.status.ok()) {
    // The coordinator has been told that it waits; what is late so often is better negotiated.
    const StandingUse next{begun->use.number, begun->use.use + 1};
    standing_.on_ended(next, actions_.discards);
    message.ended.push_back(next);
  }
  for (const Request& held : std::exchange(held_back_, {})) {
    if (sets_.failure(held.key.process_set).ok()) ask(message, cached_id(held), held);
  }
  submit(std::move(message), now);
}

void Controller::handle(const CallEnded& event, TimePoint now) {
  if (is_coordinator()) coordinator_->set_in_flight(event.in_flight);
  if (is_standing_call(event.call)) end_standing_flight(event, now);
  // When the set itself has failed, the others have their own news of it.
  if (event.status.ok() || !sets_.failure(event.process_set).ok() || ended_) return;
  const CallFailedMessage message{event.process_set, event.call, event.status.text()};
  if (is_coordinator()) {
    coordinator_->on_call_failed(rank_, message, outbox_);
  } else if (!lost_.contains(coordinator_rank())) {
    to_coordinator(message);
  }
}

void Controller::handle(const StallNoticed& event, TimePoint /*now*/) {
  const StallQueryMessage query{event.keys};
  if (is_coordinator()) {
    actions_.stalls = coordinator_->on_stall_query(rank_, query).lines;
  } else if (!lost_.contains(coordinator_rank())) {
    to_coordinator(query);
  }
}

void Controller::handle(const TimePassed& /*event*/, TimePoint now) {
  if (standing_.next_deadline() > now) return;
  RequestsMessage message;
  message.overdue.push_back(standing_.take_overdue());
  submit(std::move(message), now);
}

// ---- messages -------------------------------------------------------------------------------------------------------

void Controller::handle(const MessageArrived& event, TimePoint now) {
  const Status taken = take_message(event.peer, event.bytes, now);
  if (!taken.ok()) lose_peer(event.peer, fmt::format("rank {} is lost: {}", event.peer, taken.text()));
}

Status Controller::take_message(int peer, std::span<const std::byte> bytes, TimePoint now) {
  Result<MessageKind> kind = message_kind(bytes);
  if (!kind) return kind.status();
  const auto refuse = [&] { return Status::internal("it sent a message that is not meant for this rank"); };
  switch (*kind) {
    case MessageKind::kRequests: {
      if (!is_coordinator()) return refuse();
      Result<RequestsMessage> message = decode_requests(bytes);
      if (!message) return message.status();
      coordinator_->on_requests(peer, std::move(message).value(), now, outbox_);
      return {};
    }
    case MessageKind::kResponses: {
      if (peer != coordinator_rank()) return refuse();
      Result<ResponsesMessage> message = decode_responses(bytes);
      if (!message) return message.status();
      follow(std::move(message).value(), now);
      return {};
    }
    case MessageKind::kShutdown:
      if (!is_coordinator()) return refuse();
      coordinator_->on_shutdown(peer, outbox_);
      return {};
    case MessageKind::kPeerLost: {
      Result<PeerLostMessage> message = decode_peer_lost(bytes);
      if (!message) return message.status();
      lose_peer(message->rank, message->text);
      return {};
    }
    case MessageKind::kCallFailed: {
      Result<CallFailedMessage> message = decode_call_failed(bytes);
      if (!message) return message.status();
      if (is_coordinator()) coordinator_->on_call_failed(peer, *message, outbox_);
      if (is_standing_call(message->call) && standing_.on_call_failed(message->call, actions_.discards)) {
        withdraw_standing();
      }
      actions_.failed_calls.push_back({message->process_set, message->call, Status::internal(message->text)});
      return {};
    }
    case MessageKind::kStallQuery: {
      if (!is_coordinator()) return refuse();
      Result<StallQueryMessage> message = decode_stall_query(bytes);
      if (!message) return message.status();
      actions_.messages.emplace_back(peer, encode(coordinator_->on_stall_query(peer, *message)));
      return {};
    }
    case MessageKind::kStallReport: {
      Result<StallReportMessage> message = decode_stall_report(bytes);
      if (!message) return message.status();
      for (StallReportMessage::Line& line : message->lines) actions_.stalls.push_back(std::move(line));
      return {};
    }
  }
  return {};
}

// Sends the coordinator's answers; this rank's own part is followed at once.
void Controller::distribute(TimePoint now) {
  coordinator_->flush(now, outbox_);
  while (!outbox_.responses.empty() || !outbox_.messages.empty()) {
    Coordinator::Outbox out = std::exchange(outbox_, {});
    for (auto& message : out.messages) {
      if (message.first != rank_) actions_.messages.push_back(std::move(message));
    }
    for (auto& [rank, responses] : out.responses) {
      if (rank != rank_) actions_.messages.emplace_back(rank, encode(responses));
    }
    const auto own = out.responses.find(rank_);
    if (own != out.responses.end()) follow(std::move(own->second), now);
    coordinator_->flush(now, outbox_);
  }
  actions_.look_again = coordinator_->next_deadline();
}

}  // namespace hvd
