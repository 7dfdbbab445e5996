#include "tests/simulator/world.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace hvd::simulator {
namespace {

constexpr int kMostStepsAtOnce = 200'000;
constexpr std::uint64_t kMostEvents = 60'000'000;
constexpr Duration kLongestJob = std::chrono::minutes(10);
constexpr ProcessSetId kNoSet = 0xffff;

MembershipRef everyone(int size) {
  auto membership = std::make_shared<Membership>();
  membership->ranks.resize(static_cast<std::size_t>(size));
  std::iota(membership->ranks.begin(), membership->ranks.end(), 0);
  membership->hosts.assign(static_cast<std::size_t>(size), 0);
  return membership;
}

// Fails one transfer of one rank.
class OneFault final : public FaultHook {
 public:
  OneFault(TransferFault fault, std::function<void()> on_fault) : fault_(fault), on_fault_(std::move(on_fault)) {}

  FaultAction at(FaultPoint point, int /*peer*/) override {
    const FaultPoint wanted = fault_.sends ? FaultPoint::kSegmentSend : FaultPoint::kSegmentReceive;
    if (point != wanted || ++passages_ != fault_.passage) return FaultAction::kPass;
    on_fault_();
    return FaultAction::kFail;
  }

 private:
  TransferFault fault_;
  std::function<void()> on_fault_;
  int passages_ = 0;
};

std::uint64_t hash_of(std::span<const std::byte> bytes) {
  std::uint64_t hash = bytes.size();
  for (const std::byte byte : bytes) hash = (hash ^ static_cast<std::uint64_t>(byte)) * 1099511628211u;
  return hash;
}

// What the differing rank says instead.
void make_odd(Request& request, const OperationPlan& plan, const SetPlan& set) {
  using Odd = OperationPlan::Odd;
  switch (plan.odd) {
    case Odd::kNothing:
      return;
    case Odd::kDataType:
      request.dtype = request.dtype == DataType::kInt16 ? DataType::kFloat16 : DataType::kInt16;
      return;
    case Odd::kShape:
      if (!plan.rows.empty()) {
        request.shape.push_back(2);
      } else if (request.shape.empty()) {
        request.shape.push_back(1);
      } else {
        request.shape.front() += 1;
      }
      return;
    case Odd::kReduceOp:
      request.reduce_op = request.reduce_op == ReduceOp::kMin ? ReduceOp::kMax : ReduceOp::kMin;
      return;
    case Odd::kPrescale:
      request.prescale += 0.25;
      return;
    case Odd::kRoot:
      request.root_rank = plan.root == set.ranks.front() ? set.ranks.back() : set.ranks.front();
      return;
    case Odd::kRanks:
      request.shape = request.shape == Shape{0} ? Shape{1} : Shape{0};
      return;
  }
}

}  // namespace

World::World(const Scenario& scenario, bool print_trace)
    : scenario_(scenario),
      trace_(clock_),
      schedule_(clock_),
      random_(Random::mix(scenario.seed) + static_cast<std::uint64_t>(scenario.ranks)),
      network_(scenario.ranks, scenario.network, schedule_, random_.fork(), trace_, checker_),
      streams_(scenario.ranks, checker_),
      ends_(scenario, checker_),
      ranks_(static_cast<std::size_t>(scenario.ranks)) {
  if (print_trace) trace_.print_all();
  network_.sabotage(scenario.sabotage);
  network_.on_arrival([this](int rank) {
    if (rank_of(rank).wake_at == kNever || rank_of(rank).wake_at > schedule_.now() + scenario_.longest_dispatch) {
      wake(rank, schedule_.now() + random_.duration(Duration(0), scenario_.longest_dispatch));
    }
  });
  network_.on_control(
      [this](int rank, int /*peer*/, std::span<const std::byte> message) { streams_.on_message(rank, message); });
  for (int rank = 0; rank < scenario.ranks; ++rank) build_rank(rank);
}

// Ended calls tell the network to forget their transfers, so the runtimes go first.
World::~World() {
  for (Rank& rank : ranks_) rank.runtime.reset();
}

void World::build_rank(int rank) {
  Rank& state = rank_of(rank);
  auto fabric = std::make_unique<Fabric>(rank, scenario_.ranks);
  Transport& transport = fabric->add(network_.connect(rank));
  for (int peer = 0; peer < scenario_.ranks; ++peer) {
    fabric->route_control(peer, transport);
    fabric->route_data(peer, transport);
  }
  fabric->share_blocks(scenario_.network.slot_bytes);
  Runtime::Settings settings;
  settings.everyone = rank == 0 ? everyone(scenario_.ranks) : rank_of(0).runtime->process_set(0);
  settings.options = scenario_.options;
  state.set_ids.assign(scenario_.sets.size(), kNoSet);
  state.set_ids[0] = 0;
  for (std::size_t slot = 1; slot < scenario_.sets.size() && !scenario_.sets[slot].added_on_the_way; ++slot) {
    settings.process_sets.push_back(scenario_.sets[slot].ranks);
    state.set_ids[slot] = static_cast<ProcessSetId>(slot);
  }
  if (scenario_.fault && scenario_.fault->rank == rank) {
    state.fault = std::make_unique<OneFault>(*scenario_.fault, [this] {
      ++faults_injected_;
      ends_.on_fault_injected();
    });
    settings.fault = state.fault.get();
  }
  state.operations.resize(scenario_.order[static_cast<std::size_t>(rank)].size());
  state.runtime = std::make_unique<Runtime>(std::move(fabric), clock_, std::move(settings));
}

// ---- the thread of each rank
// -----------------------------------------------------------------------------------------

void World::wake(int rank, TimePoint when) {
  Rank& state = rank_of(rank);
  if (state.dead || when >= state.wake_at || state.runtime->finished()) return;
  state.wake_at = when;
  schedule_.at(when, [this, rank] {
    Rank& woken = rank_of(rank);
    if (woken.wake_at != schedule_.now() || woken.dead) return;  // an earlier wake-up took its place
    woken.wake_at = kNever;
    run_rank(rank);
  });
}

// As the product's background loop: steps while anything moves, then sleeps until somebody rings or a deadline comes.
void World::run_rank(int rank) {
  Rank& state = rank_of(rank);
  Runtime& runtime = *state.runtime;
  runtime.woken();
  for (int steps = 1;; ++steps) {
    const bool moved = runtime.step();
    if (checker_.broken()) return;
    collect_resolved(rank);
    if (runtime.finished()) {
      trace_.note(Trace::What::kFinished, rank, -1, 0, 0);
      last_finish_ = schedule_.now();
      return;
    }
    if (steps > kMostStepsAtOnce) {
      checker_.report(invariant::kNoEndlessWait, fmt::format("rank {} works without an end at one instant", rank));
      return;
    }
    if (!moved && runtime.prepare_to_sleep()) break;
    runtime.woken();
    if (scenario_.steps_at_a_time > 0 && steps >= scenario_.steps_at_a_time) {
      wake(rank, schedule_.now() + random_.duration(Duration(1), scenario_.longest_dispatch + Duration(100)));
      return;
    }
  }
  trace_.note(Trace::What::kStep, rank, -1, 0, 0);
  const TimePoint deadline = runtime.next_deadline();
  if (deadline <= schedule_.now()) {
    checker_.report(invariant::kIdleSilence,
                    fmt::format("rank {} has nothing to do and asks to be woken in the past", rank));
  } else if (deadline != kNever) {
    wake(rank, deadline);
  }
}

void World::collect_resolved(int rank) {
  Rank& state = rank_of(rank);
  bool any = false;
  bool join_failed = false;  // the rank is not among those that joined: nobody will do its part for it
  std::erase_if(state.open, [&](std::size_t place) {
    Operation& operation = state.operations[place];
    if (!operation.handle->done()) return false;
    const int index = index_at(rank, place);
    const OperationPlan& plan = plan_at(rank, place);
    operation.resolved = any = true;
    ++counts_.operations;
    const Status& status = operation.handle->status();
    trace_.note(Trace::What::kResolved, rank, -1, static_cast<std::uint64_t>(index),
                static_cast<std::uint64_t>(status.code()));
    Buffers& buffers = *operation.buffers;
    const SetPlan& members = scenario_.sets[static_cast<std::size_t>(plan.slot)];
    const std::vector<std::byte>& memory = plan.in_place ? buffers.input : buffers.output;
    const std::vector<std::byte> result = in_c_order(plan, members, rank, memory);
    ends_.on_resolved(rank, index, *operation.handle, result);
    if (status.ok()) {
      const ProcessSetId set = state.set_ids[static_cast<std::size_t>(plan.slot)];
      streams_.on_done(rank, {set, plan.op, plan.name});
      if (plan.op == OpKind::kProcessSetAdd) {
        state.set_ids[static_cast<std::size_t>(plan.subject)] = operation.handle->output().process_set;
      }
    }
    if (plan.op == OpKind::kJoin && !status.ok()) join_failed = true;
    operation.final_hash = hash_of(buffers.input) ^ hash_of(buffers.output) << 1;
    operation.final_status = &status.text();
    return true;
  });
  if (join_failed && !state.dead) stop_program(rank);
  if (any) continue_program(rank);
}

// ---- the program of each rank
// ----------------------------------------------------------------------------------------

const OperationPlan& World::plan_at(int rank, std::size_t place) const {
  return scenario_.operations[static_cast<std::size_t>(index_at(rank, place))];
}

void World::continue_program(int rank) {
  Rank& state = rank_of(rank);
  while (!state.thinking && !state.stopped_program && !state.dead && state.next < state.operations.size()) {
    if (must_wait(rank, plan_at(rank, state.next)) || !enqueue_next(rank)) return;
    if (scenario_.longest_think > Duration(0) && random_.chance(scenario_.think_percent)) {
      state.thinking = true;
      schedule_.after(random_.duration(Duration(1), scenario_.longest_think), [this, rank] {
        rank_of(rank).thinking = false;
        continue_program(rank);
      });
    }
  }
}

// A name may come again when its last use has ended; a set may be used when its addition has, and removed when all of
// its operations have. So an operation waits for earlier batches only, and no program can block another for ever.
bool World::must_wait(int rank, const OperationPlan& plan) {
  const Rank& state = rank_of(rank);
  const int batch = plan.batch;
  return std::any_of(state.open.begin(), state.open.end(), [&](std::size_t place) {
    const OperationPlan& open = plan_at(rank, place);
    const bool joins_at_once = scenario_.joins_at_once && plan.op == OpKind::kJoin;
    if (scenario_.waits_after_batch && open.batch < batch && !joins_at_once) return true;
    if (open.op == plan.op && open.slot == plan.slot && open.name == plan.name) return true;
    const bool adds = open.op == OpKind::kProcessSetAdd;
    if (adds && (open.subject == plan.slot || (plan.op == OpKind::kProcessSetRemove && open.subject == plan.subject))) {
      return true;
    }
    return plan.op == OpKind::kProcessSetRemove && open.slot == plan.subject && !scenario_.careless_removal;
  });
}

// False when the program has ended.
bool World::enqueue_next(int rank) {
  Rank& state = rank_of(rank);
  const std::size_t place = state.next++;
  const OperationPlan& plan = plan_at(rank, place);
  const int index = index_at(rank, place);
  if (plan.absent_rank == rank) return true;
  const int needed = plan.op == OpKind::kProcessSetRemove ? plan.subject : plan.slot;
  if (state.set_ids[static_cast<std::size_t>(needed)] == kNoSet) {
    // Its addition failed: on all ranks alike when they disagreed, but here alone when a peer died at that moment.
    if (scenario_.death) stop_program(rank);
    return !state.stopped_program;
  }
  Operation& operation = state.operations[place];
  operation.handle = std::make_shared<HandleState>();
  TensorEntry entry = make_entry(rank, plan, index, operation);
  const TensorEntry copy = entry;
  const Status status =
      state.runtime->enqueue(std::move(entry), plan.op == OpKind::kBroadcast ? CallSite{"train.py", 7} : CallSite{});
  if (!status.ok()) {
    trace_.note(Trace::What::kRefused, rank, -1, static_cast<std::uint64_t>(index), 0);
    ends_.on_refused(rank, index, status);
    operation.handle.reset();
    const bool set_has_gone = scenario_.careless_removal && status.code() == StatusCode::kInvalidArgument;
    if (!set_has_gone) state.stopped_program = true;
    note_enqueued();
    return set_has_gone;
  }
  trace_.note(Trace::What::kEnqueue, rank, -1, static_cast<std::uint64_t>(index), 0);
  operation.ended_in_enqueue = operation.handle->done();
  state.open.push_back(place);
  if (plan.twice_rank == rank && !operation.ended_in_enqueue) enqueue_twice(rank, operation, copy);
  // A rank whose job has ended runs no more, and what enqueue itself ends needs no run.
  if (operation.ended_in_enqueue) schedule_.after(Duration(0), [this, rank] { collect_resolved(rank); });
  wake(rank, schedule_.now() + random_.duration(Duration(0), scenario_.longest_dispatch));
  note_enqueued();
  return true;
}

TensorEntry World::make_entry(int rank, const OperationPlan& plan, int index, Operation& operation) {
  Rank& state = rank_of(rank);
  const SetPlan& set = scenario_.sets[static_cast<std::size_t>(plan.slot)];
  operation.buffers = std::make_shared<Buffers>();
  Buffers& buffers = *operation.buffers;
  buffers.input = laid_out(plan, set, rank, input_of(scenario_, index, rank));
  const bool own_output = plan.op == OpKind::kAllreduce || plan.op == OpKind::kBroadcast;
  if (own_output && !plan.in_place) buffers.output.assign(buffers.input.size(), std::byte{0xa5});
  TensorEntry entry;
  Request& request = entry.request;
  request.key = {state.set_ids[static_cast<std::size_t>(plan.slot)], plan.op, plan.unnamed ? "" : plan.name};
  request.dtype = plan.dtype;
  request.reduce_op = plan.reduce_op;
  request.prescale = plan.prescale;
  request.postscale = plan.postscale;
  request.root_rank = plan.root;
  const auto member =
      static_cast<std::size_t>(std::lower_bound(set.ranks.begin(), set.ranks.end(), rank) - set.ranks.begin());
  const std::vector<Shape> shapes = plan.shapes(static_cast<int>(member));
  request.shape = shapes.front();
  request.has_splits = plan.op == OpKind::kAlltoall;
  if (request.has_splits) request.splits = plan.splits[member];
  if (plan.op == OpKind::kProcessSetRemove) request.shape = {state.set_ids[static_cast<std::size_t>(plan.subject)]};
  const std::vector<std::vector<std::int64_t>> strides = strides_of_tensors(plan, set, rank);
  if (plan.layout != 0) request.order = memory_order(shapes.front(), strides.front()).value();
  if (plan.odd_rank == rank) make_odd(request, plan, set);
  entry.input = buffers.input.data();
  if (own_output) entry.output = plan.in_place ? buffers.input.data() : buffers.output.data();
  const std::vector<std::size_t> counts = counts_of(plan, set, rank);
  std::size_t offset = 0;
  for (std::size_t i = 1; i < counts.size(); ++i) {  // a group lies in one piece
    offset += counts[i - 1] * size_of(plan.dtype);
    const MemoryOrder order = plan.layout != 0 ? memory_order(shapes[i], strides[i]).value() : kCOrder;
    request.more.push_back({plan.dtype, shapes[i], order});
    entry.more.push_back({entry.input + offset, own_output ? entry.output + offset : nullptr});
  }
  entry.handle = operation.handle;
  entry.keep_alive = operation.buffers;
  return entry;
}

// The same name again while the first has not been seen by any step.
void World::enqueue_twice(int rank, Operation& operation, const TensorEntry& entry) {
  TensorEntry second = entry;
  operation.refused = std::make_shared<HandleState>();
  second.handle = operation.refused;
  const std::string name = entry.request.key.name;
  const Status status = rank_of(rank).runtime->enqueue(std::move(second), {});
  if (status.code() == StatusCode::kInvalidArgument && status.text().find("'" + name + "'") != std::string::npos) {
    return;
  }
  checker_.report(invariant::kExpectedEnd,
                  fmt::format("rank {} enqueued '{}' twice and got: {}", rank, name, status.text()));
}

void World::note_enqueued() {
  ++enqueued_;
  std::erase_if(waiting_incidents_, [&](auto& incident) {
    if (incident.first > enqueued_) return false;
    incident.second();
    return true;
  });
}

void World::stop_program(int rank) {
  rank_of(rank).stopped_program = true;
  ends_.expect_shutdown();
  shut_down(rank);
}

// ---- what goes wrong
// -------------------------------------------------------------------------------------------------

void World::plan_incident(const Incident& incident, void (World::*what)(int), int rank) {
  const Duration delay = incident.delay;
  std::function<void()> happen = [this, delay, what, rank] {
    schedule_.after(delay, [this, what, rank] { (this->*what)(rank); });
  };
  if (incident.after_enqueued == 0) {
    happen();
  } else {
    waiting_incidents_.emplace_back(incident.after_enqueued, std::move(happen));
  }
}

void World::die(int rank) {
  Rank& state = rank_of(rank);
  if (state.dead || state.runtime->finished()) return;
  trace_.note(Trace::What::kDeath, rank, -1, 0, 0);
  state.dead = true;
  ++counts_.deaths;
  network_.kill(rank);
}

// Nobody learns of it: only a shutdown ends the wait for such a rank, of everybody when it is the coordinator that
// hangs.
void World::hang(int rank) {
  if (rank_of(rank).dead || rank_of(rank).runtime->finished()) return;
  rank_of(rank).dead = true;
  for (int other = 0; other < scenario_.ranks; ++other) {
    if (rank != 0 && other != scenario_.shutdown->rank) continue;
    schedule_.after(scenario_.shutdown->delay, [this, other] { shut_down(other); });
  }
}

void World::shut_down(int rank) {
  Rank& state = rank_of(rank);
  if (state.dead || state.runtime->finished()) return;
  trace_.note(Trace::What::kShutdown, rank, -1, 0, 0);
  ++counts_.shutdowns;
  state.runtime->request_shutdown();
  wake(rank, schedule_.now());
}

// ---- phases
// ----------------------------------------------------------------------------------------------------------

Report World::run() {
  if (scenario_.death) plan_incident(*scenario_.death, &World::die, scenario_.death->rank);
  if (scenario_.hang) {
    plan_incident(*scenario_.hang, &World::hang, scenario_.hang->rank);
  } else if (scenario_.shutdown) {
    plan_incident(*scenario_.shutdown, &World::shut_down, scenario_.shutdown->rank);
  }
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    schedule_.after(random_.duration(Duration(0), scenario_.longest_think), [this, rank] { continue_program(rank); });
  }
  if (run_events()) check_nobody_waits();
  if (!checker_.broken()) check_idle_silence();
  if (!checker_.broken()) end_job();
  if (!checker_.broken()) check_the_books();
  Report report;
  report.invariant = checker_.invariant();
  report.text = checker_.text();
  if (!report.ok()) report.trace = trace_.last_lines();
  report.trace_hash = trace_.hash();
  report.rounded_sums = ends_.rounded_sums();
  counts_.calls = streams_.calls();
  counts_.fused_calls = streams_.fused_calls();
  counts_.evictions = streams_.evictions();
  counts_.errors = ends_.errors();
  counts_.faults = faults_injected_;
  counts_.events = static_cast<std::int64_t>(schedule_.events_run());
  for (const Rank& rank : ranks_) {
    const RuntimeStatistics statistics = rank.runtime->statistics();
    counts_.cache_hits += statistics.cache_hits.value();
    counts_.standing_calls += statistics.executor.standing_calls.value();
    counts_.withdrawn_calls += statistics.executor.standing_calls_withdrawn.value();
    counts_.bytes_reordered += statistics.executor.bytes_reordered.value();
  }
  report.counts = counts_;
  return report;
}

// Until nothing can move any more. False when an invariant broke.
bool World::run_events() {
  const TimePoint latest = schedule_.now() + kLongestJob;
  while (!schedule_.empty() && !checker_.broken()) {
    schedule_.run_next();
    if (schedule_.now() > latest || schedule_.events_run() > kMostEvents) {
      checker_.report(invariant::kNoEndlessWait, "the job goes on and on, and" + states());
    }
  }
  return !checker_.broken();
}

std::string World::state_of(int rank) {
  const Rank& state = rank_of(rank);
  std::string text = fmt::format("rank {}{} has enqueued {} of {}", rank,
                                 state.runtime->finished() ? " (finished)" : "", state.next, state.operations.size());
  for (const std::size_t place : state.open) {
    const OperationPlan& plan = plan_at(rank, place);
    text += fmt::format(", waits for #{} {} '{}' (set {})", index_at(rank, place), name_of(plan.op), plan.name,
                        state.set_ids[static_cast<std::size_t>(plan.slot)]);
  }
  return text;
}

std::string World::states() {
  std::string text;
  for (int rank = 0; rank < std::min(scenario_.ranks, 16); ++rank) {
    if (!rank_of(rank).dead) text += "\n    " + state_of(rank);
  }
  return text;
}

void World::check_nobody_waits() {
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    const Rank& state = rank_of(rank);
    if (state.dead) continue;
    const bool program_done = state.stopped_program || state.next == state.operations.size();
    if (program_done && state.open.empty()) continue;
    checker_.report(invariant::kNoEndlessWait, "nothing moves any more, and" + states());
    return;
  }
}

// An hour later, still nobody has anything to say.
void World::check_idle_silence() {
  const std::uint64_t messages = network_.control_messages();
  clock_.set(clock_.now() + std::chrono::hours(1));
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    const Rank& state = rank_of(rank);
    if (state.dead || state.runtime->finished()) continue;
    if (state.runtime->step() || state.runtime->next_deadline() != kNever) {
      checker_.report(invariant::kIdleSilence, fmt::format("rank {} still finds something to do", rank));
    }
  }
  if (network_.control_messages() != messages || !schedule_.empty()) {
    checker_.report(invariant::kIdleSilence, "messages are sent though everything has been resolved");
  }
}

void World::end_job() {
  const TimePoint begin = schedule_.now();
  const bool coordinator_is_dead = rank_of(0).dead;
  // One call is enough while there is a coordinator to pass it on.
  std::vector<int> callers;
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    if (!rank_of(rank).dead) callers.push_back(rank);
  }
  if (callers.empty()) return;
  random_.shuffle(callers);
  if (!coordinator_is_dead) callers.resize(1 + random_.below(callers.size()));
  for (const int rank : callers) {
    const Duration longest = std::min<Duration>(scenario_.longest_think, std::chrono::milliseconds(2));
    schedule_.after(random_.duration(Duration(0), longest), [this, rank] { shut_down(rank); });
  }
  if (!run_events()) return;
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    if (rank_of(rank).dead || rank_of(rank).runtime->finished()) continue;
    checker_.report(invariant::kFarewell, fmt::format("rank {} never finished after the shutdown", rank));
  }
  if (scenario_.is_undisturbed() && last_finish_ - begin >= Duration(scenario_.options.shutdown_timeout)) {
    checker_.report(invariant::kFarewell, "the farewell of a healthy job took its whole time limit");
  }
}

// The coordinator carries out what it told the others, and what it told itself alone in a set of its own.
void World::check_calls_carried_out() {
  std::int64_t told_by_coordinator = 0;
  bool alone = false;
  for (std::size_t slot = 0; slot < scenario_.sets.size(); ++slot) {
    const ProcessSetId id = rank_of(0).set_ids[slot];
    if (id == kNoSet || !scenario_.sets[slot].contains(0)) continue;
    told_by_coordinator += streams_.calls_in(id);
    if (scenario_.sets[slot].ranks.size() == 1) alone = true;
  }
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    const std::int64_t told = rank == 0 ? told_by_coordinator : streams_.calls_told(rank);
    const ExecutorStatistics statistics = rank_of(rank).runtime->statistics().executor;
    const std::int64_t carried_out = statistics.collective_calls.value() - statistics.standing_calls.value();
    if (carried_out == told || (rank == 0 && alone && carried_out > told)) continue;
    checker_.report(invariant::kSameSequence,
                    fmt::format("rank {} carried out {} calls where {} are due", rank, carried_out, told));
  }
}

// Handles, memory, messages and counters, when everything is over.
void World::check_the_books() {
  ends_.check_all_alike();
  for (int rank = 0; rank < scenario_.ranks; ++rank) {
    const Rank& state = rank_of(rank);
    if (state.dead) continue;
    std::int64_t resolved = 0;
    for (const Operation& operation : state.operations) {
      if (operation.refused && operation.refused->done()) {
        checker_.report(invariant::kResolvesOnce, fmt::format("rank {}: a refused handle was resolved", rank));
      }
      if (!operation.handle) continue;
      if (!operation.ended_in_enqueue) ++resolved;
      if (operation.final_status != &operation.handle->status().text()) {
        checker_.report(invariant::kResolvesOnce, fmt::format("rank {}: a handle was resolved twice", rank));
      }
      if (operation.final_hash != (hash_of(operation.buffers->input) ^ hash_of(operation.buffers->output) << 1)) {
        checker_.report(invariant::kQuietMemory,
                        fmt::format("rank {}: memory was written after its handle was resolved", rank));
      }
    }
    const ExecutorStatistics statistics = state.runtime->statistics().executor;
    const std::int64_t counted = statistics.operations_done.value() + statistics.operations_failed.value();
    if (counted != resolved) {
      checker_.report(invariant::kResolvesOnce,
                      fmt::format("rank {}: {} handles were resolved, the engine counts {}", rank, resolved, counted));
    }
  }
  if (!scenario_.is_undisturbed()) return;
  check_calls_carried_out();
  if (const std::string left_over = network_.unpaired(); !left_over.empty()) {
    checker_.report(invariant::kTransportContract, left_over);
  }
}

Report simulate(const Scenario& scenario, bool print_trace) {
  Report report = World(scenario, print_trace).run();
  const bool rounds = std::any_of(report.rounded_sums.begin(), report.rounded_sums.end(),
                                  [](const std::vector<std::byte>& sum) { return !sum.empty(); });
  if (!report.ok() || !rounds || !scenario.is_undisturbed()) return report;
  Scenario unfused = scenario;
  unfused.options.fusion_threshold_bytes = 0;
  unfused.options.standing_after = 0;
  Report again = World(unfused, print_trace).run();
  if (!again.ok()) return again;
  for (std::size_t i = 0; i < report.rounded_sums.size(); ++i) {
    if (report.rounded_sums[i] == again.rounded_sums[i]) continue;
    // In a set that is carelessly removed an operation ends well or not, as it comes.
    const bool one_failed = report.rounded_sums[i].empty() || again.rounded_sums[i].empty();
    if (scenario.careless_removal && one_failed) continue;
    report.invariant = invariant::kSameSum;
    report.text = fmt::format("operation #{} ('{}') has other bits when nothing is fused and all is negotiated", i,
                              scenario.operations[i].name);
    break;
  }
  return report;
}

}  // namespace hvd::simulator
