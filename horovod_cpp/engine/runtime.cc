#include "horovod_cpp/engine/runtime.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>

#include "common/log.h"

namespace hvd {
namespace {

constexpr int kResumesPerStep = 16;  // then control messages are looked at again
constexpr Duration kPollingNap = std::chrono::microseconds(50);

// Where a standing call goes by messages, copies cost more than what it spares from here on.
constexpr std::size_t kStandingByMessages = std::size_t{64} << 10;

CoordinatorSettings coordinator_settings(const Options& options, std::size_t slot_bytes, Timeline* timeline) {
  CoordinatorSettings settings;
  settings.fusion = {options.fusion_threshold_bytes, options.fusion_copy_limit_bytes, options.small_limit_bytes};
  settings.cache_capacity = options.cache_capacity;
  settings.company_time = options.cycle_time;
  settings.stall_shutdown_time = options.stall_shutdown_time;
  settings.standing_limit_bytes = std::min(options.standing_limit_bytes, std::max(slot_bytes, kStandingByMessages));
  settings.standing_after = options.standing_after;
  settings.timeline = timeline;
  return settings;
}

// Memory in another order than C order is for operations, and for memory, that can do with it.
Status check_orders(const Request& request, const OpRule& rule) {
  if (rule.any_order && request.memory == MemoryKind::kHost) return {};
  for (std::size_t i = 0; i <= request.more.size(); ++i) {
    if (order_of(request, i) == kCOrder) continue;
    const Shape& shape = i == 0 ? request.shape : request.more[i - 1].shape;
    return Status::invalid_argument(fmt::format("a tensor of shape {} has strides {}, and has to lie in C order {}",
                                                shape_text(shape), shape_text(strides_of(shape, order_of(request, i))),
                                                rule.any_order ? "in the memory of a device" : "for this operation"));
  }
  return {};
}

}  // namespace

Runtime::Runtime(std::unique_ptr<Fabric> fabric, const Clock& clock, Settings settings)
    : clock_(clock),
      settings_(std::move(settings)),
      fabric_(std::move(fabric)),
      loop_(clock),
      sets_(settings_.everyone),
      published_sets_(sets_),
      controller_(fabric_->rank(), sets_,
                  coordinator_settings(settings_.options, fabric_->slot_bytes(), settings_.timeline)),
      devices_(loop_, settings_.devices, settings_.options,
               [this](ProcessSetId set, std::uint64_t call, const Status& reason) {
                 ended_calls_.push_back({set, call, reason, executor_.in_flight()});
               }),
      executor_(loop_, *fabric_, sets_, queue_, devices_, settings_.options,
                [this](CallEnded ended) { ended_calls_.push_back(std::move(ended)); }),
      stalls_(settings_.options.stall_check_time),
      slow_calls_(settings_.options.stall_check_time, settings_.options.stall_shutdown_time),
      said_goodbye_(static_cast<std::size_t>(fabric_->size())),
      lost_(static_cast<std::size_t>(fabric_->size())) {
  executor_.record_in(settings_.timeline);
  fabric_->set_events(*this);
  fabric_->set_fault_hook(settings_.fault);
  ProcessSetId id = 1;
  for (const std::vector<int>& ranks : settings_.process_sets) controller_.add_process_set(id++, ranks);
  publish_sets();
}

Runtime::~Runtime() {
  const Status reason = Status::internal("Horovod has been shut down.");
  executor_.end_entries(queue_.close(reason), reason);
  executor_.fail_all(reason);
  devices_.abandon(reason);
  end_calls();
}

// ---- any thread -----------------------------------------------------------------------------------------------------

Status Runtime::enqueue(TensorEntry entry, const CallSite& call_site) {
  const Request& request = entry.request;
  const OpRule* rule = find_op_rule(request.key.op);
  if (rule == nullptr) return Status::invalid_argument("the operation is not known");
  MembershipRef membership;
  Status failure;
  published_sets_.with([&](const ProcessSetTable& sets) {
    membership = sets.find(request.key.process_set);
    if (membership) failure = sets.failure(request.key.process_set);
  });
  const std::string_view op = name_of(request.key.op);
  if (!membership) {
    return Status::invalid_argument(fmt::format(
        "{}: Process set provided does not exist, or has not been registered. (id {})", op, request.key.process_set));
  }
  if (!membership->contains(rank())) {
    return Status::precondition(fmt::format("{}: Rank {} is not a member of the provided process set.", op, rank()));
  }
  if (const Status checked = rule->check(request, *membership); !checked.ok()) {
    return {checked.code(), fmt::format("{}: {}", operation_text(request.key), checked.text())};
  }
  if (const Status ordered = check_orders(request, *rule); !ordered.ok()) {
    return {ordered.code(), fmt::format("{}: {}", operation_text(request.key), ordered.text())};
  }
  if (!failure.ok()) {
    entry.handle->complete(failure);  // the set has lost a member: every later handle gets the reason
    return {};
  }
  if (entry.request.memory != MemoryKind::kHost) {
    if (const Status received = devices_.receive(entry); !received.ok()) {
      return {received.code(), fmt::format("{}: {}", operation_text(request.key), received.text())};
    }
  }
  entry.enqueued = clock_.now();
  return queue_.push(std::move(entry), call_site);
}

MembershipRef Runtime::process_set(ProcessSetId id) const {
  return published_sets_.with([&](const ProcessSetTable& sets) { return sets.find(id); });
}

int Runtime::ranks_on_this_host() const {
  const Membership& all = *settings_.everyone;
  const int here = all.hosts[static_cast<std::size_t>(rank())];
  return static_cast<int>(std::count(all.hosts.begin(), all.hosts.end(), here));
}

std::vector<ProcessSetId> Runtime::process_set_ids() const {
  return published_sets_.with([](const ProcessSetTable& sets) { return sets.ids(); });
}

RuntimeStatistics Runtime::statistics() const {
  return {executor_.statistics(), fabric_->statistics(), controller_.cache_hits(), devices_.statistics()};
}

void Runtime::publish_sets() {
  published_sets_.with([&](ProcessSetTable& copy) { copy = sets_; });
}

// ---- the loop -------------------------------------------------------------------------------------------------------

bool Runtime::step() {
  bool moved = take_enqueued();
  if (fabric_->progress()) moved = true;
  if (loop_.run_ready(kResumesPerStep) > 0) moved = true;
  if (loop_.run_timers() > 0) moved = true;
  for (CallEnded& ended : std::exchange(ended_calls_, {})) {
    dispatch(ended);
    moved = true;
  }
  stepped_at_ = clock_.now();  // once: that costs as much as a look at a few peers
  if (controller_deadline_ <= stepped_at_) {
    dispatch(TimePassed{});
    moved = true;
  }
  if (check_stalls(stepped_at_)) moved = true;
  if (check_calls(stepped_at_)) moved = true;
  if (continue_closing(stepped_at_)) moved = true;
  return moved;
}

bool Runtime::take_enqueued() {
  bool moved = false;
  // Other ranks may have ended their part already and ask for nothing more: what waited for them would wait for ever.
  for (const auto& [set, reason] : devices_.failed_sets()) {
    std::vector<TensorEntry> hopeless = queue_.take_on_devices(set);
    if (!hopeless.empty()) moved = true;
    executor_.end_entries(std::move(hopeless), reason);
  }
  if (queue_.has_new()) {
    RequestsEnqueued fresh = queue_.drain();
    if (is_on(settings_.timeline)) settings_.timeline->taken_up(fresh, queue_);
    dispatch(std::move(fresh));
    moved = true;
  }
  if (shutdown_wanted_.exchange(false) && !std::exchange(shutdown_requested_, true)) {
    // A coordinator that does not answer must not keep this rank from ending.
    shutdown_deadline_ = clock_.now() + settings_.options.shutdown_timeout;
    dispatch(ShutdownWanted{});
    moved = true;
  }
  return moved;
}

TimePoint Runtime::next_deadline() const {
  TimePoint next = std::min({loop_.next_timer(), controller_deadline_, closing_deadline_, shutdown_deadline_});
  next = std::min(next, fabric_->next_deadline());
  next = std::min(next, stalls_.next_look(queue_));
  next = std::min(next, slow_calls_.next_look(executor_));
  if (fabric_->needs_polling()) next = std::min(next, clock_.now() + kPollingNap);
  return next;
}

void Runtime::dispatch(const Event& event) { carry_out(controller_.on_event(event, clock_.now())); }

void Runtime::carry_out(Actions actions) {
  controller_deadline_ = actions.look_again;
  for (auto& [peer, message] : actions.messages) {
    // Who has said goodbye sends nothing more, not even the answer to a late question.
    if (!lost_[static_cast<std::size_t>(peer)] && !goodbyes_sent_) fabric_->post(peer, std::move(message));
  }
  const bool sets_changed =
      !actions.failed_sets.empty() ||
      std::any_of(actions.responses.begin(), actions.responses.end(), [](const Response& response) {
        return response.op == OpKind::kProcessSetAdd || response.op == OpKind::kProcessSetRemove;
      });
  if (sets_changed) publish_sets();  // before any handle ends, so that its waiter sees them
  // The coordinator may know of a loss before a transport of this rank does.
  if (!actions.failed_sets.empty() && !closing_) lost_a_peer_.store(true);
  for (const LostRank& lost : actions.lost_ranks) {
    executor_.fail_rank(lost.rank, lost.reason);
    // It may live, and others may have called it lost: it must not wait for a rank that answers no more.
    fabric_->give_up(lost.rank, lost.reason);
  }
  for (const FailedSet& failed : actions.failed_sets) fail_set(failed);
  for (const WithdrawnCall& call : actions.withdrawn) executor_.withdraw(call);
  for (Response& response : actions.responses) {
    if (response.kind == Response::Kind::kShutdown) {
      begin_closing(response.status());
    } else {
      executor_.carry_out(std::move(response));
    }
  }
  for (const Response& call : actions.discards) executor_.discard(call);
  for (const FailedCall& failed : actions.failed_calls) executor_.fail_call(failed);
  if (!actions.stalls.empty()) {
    log::warning("{}", StallInspector::report(actions.stalls, settings_.options.stall_check_time));
  }
  if (controller_.job_has_ended() && !closing_) begin_closing(Status::internal("Horovod has been shut down."));
}

void Runtime::fail_set(const FailedSet& failed) {
  executor_.end_entries(queue_.take_set(failed.process_set), failed.reason);
  executor_.fail_set(failed.process_set, failed.reason);
}

bool Runtime::check_stalls(TimePoint now) {
  std::vector<OperationKey> stalled = stalls_.look(queue_, now);
  if (stalled.empty()) return false;
  dispatch(StallNoticed{std::move(stalled)});
  return true;
}

// All ranks have agreed on these, but they do not end: a rank has stopped, or its network.
bool Runtime::check_calls(TimePoint now) {
  const CallInspector::Found found = slow_calls_.look(executor_, now);
  if (!found.slow.empty()) log::warning("{}", CallInspector::report(found.slow, now));
  for (const CallInFlight& call : found.late) {
    executor_.give_up_call(call, Status::internal(CallInspector::late_text(call, now)));
  }
  return !found.slow.empty() || !found.late.empty();
}

// ---- events of the transports ---------------------------------------------------------------------------------------

void Runtime::on_control(int peer, std::span<const std::byte> message) { dispatch(MessageArrived{peer, message}); }

void Runtime::on_peer_lost(int peer, const Status& status) {
  lost_[static_cast<std::size_t>(peer)] = true;
  if (!closing_) lost_a_peer_.store(true);
  if (!closing_) log::warning("{}", status.text());
  dispatch(PeerLost{peer, status});
}

void Runtime::on_goodbye(int peer) { said_goodbye_[static_cast<std::size_t>(peer)] = true; }

// ---- the end --------------------------------------------------------------------------------------------------------

// Each part by itself: what has thrown may throw again.
void Runtime::break_down(const char* what) noexcept {
  const auto attempt = [](const auto& part) {
    try {
      part();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "horovod_cpp: %s\n", error.what());  // the log may be what throws
    }
  };
  Status reason = Status::internal("the engine has failed");
  attempt([&] { reason = Status::internal(fmt::format("the engine of rank {} has failed: {}", rank(), what)); });
  attempt([&] { log::error("{}", reason.text()); });
  closing_ = true;  // that the peers are gone is no news
  lost_a_peer_.store(true);
  attempt([&] { executor_.end_entries(queue_.close(reason), reason); });
  attempt([&] { executor_.fail_all(reason); });
  attempt([&] { end_calls(); });
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank()) attempt([&] { fabric_->give_up(peer, reason); });
  }
  finished_.store(true);
}

// Of what has been cancelled, also what sleeps until a device or NCCL has got somewhere: it looks at that as it wakes.
void Runtime::end_calls() {
  do {
    while (loop_.run_ready(kResumesPerStep) > 0) {
    }
  } while (loop_.wake_sleepers() > 0);
}

void Runtime::begin_closing(const Status& reason) {
  closing_ = true;
  closing_deadline_ = clock_.now() + settings_.options.shutdown_timeout;
  shutdown_deadline_ = kNever;
  executor_.end_entries(queue_.close(reason), reason);
}

// Calls that have begun are finished, then everybody says goodbye; a deadline bounds both.
bool Runtime::continue_closing(TimePoint now) {
  if (shutdown_deadline_ <= now && !closing_) {
    begin_closing(Status::internal("Horovod has been shut down; the coordinator did not answer in time."));
  }
  if (!closing_ || finished_.load()) return false;
  const bool late = closing_deadline_ <= now;
  bool moved = false;
  if (!executor_.idle() && late) {
    executor_.fail_all(Status::internal("Horovod has been shut down while the operation was in flight."));
    end_calls();  // every handle ends before this rank is finished
    moved = true;
  }
  if (!executor_.idle() && !late) return moved;
  if (devices_.pending()) {
    if (!late) return moved;  // the watch over the devices comes back
    devices_.abandon(Status::internal("Horovod has been shut down while a device was at work."));
  }
  if (!std::exchange(goodbyes_sent_, true)) {
    fabric_->say_goodbye();
    moved = true;
  }
  bool all_gone = fabric_->flushed();
  for (int peer = 0; peer < size(); ++peer) {
    const auto i = static_cast<std::size_t>(peer);
    if (peer != rank() && !said_goodbye_[i] && !lost_[i]) all_gone = false;
  }
  if (all_gone || late) {
    closing_deadline_ = kNever;
    finished_.store(true);
    moved = true;
  }
  return moved;
}

}  // namespace hvd
