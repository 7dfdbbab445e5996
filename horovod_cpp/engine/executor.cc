#include "horovod_cpp/engine/executor.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd {
namespace {

// A set's oldest running call and its newest are never further apart, so that two calls in flight never have the same
// channel number (they come round after 61,440).
constexpr std::uint64_t kWindow = 1024;

std::size_t row_elements(const Shape& shape) {
  return static_cast<std::size_t>(element_count(std::span(shape).subspan(1)).value());
}

// `count` comes from another rank.
Status add_rows(std::int64_t& rows, std::int64_t count) {
  if (count < 0 || count > std::numeric_limits<std::int64_t>::max() - rows) {
    return Status::internal(fmt::format("a rank announced {} rows", count));
  }
  rows += count;
  return {};
}

// The memory of one tensor of an entry.
TensorEntry::Memory memory_of(const TensorEntry& entry, std::size_t index) {
  return index == 0 ? TensorEntry::Memory{entry.input, entry.output} : entry.more[index - 1];
}

}  // namespace

Executor::Executor(Loop& loop, Fabric& fabric, const ProcessSetTable& sets, TensorQueue& queue, Devices& devices,
                   const Options& options, std::function<void(CallEnded)> on_call_ended)
    : loop_(loop),
      fabric_(fabric),
      sets_(sets),
      queue_(queue),
      devices_(devices),
      options_(options),
      on_call_ended_(std::move(on_call_ended)) {}

void Executor::carry_out(Response response) {
  if (is_standing_call(response.call)) {
    carry_out_standing(std::move(response));
    return;
  }
  std::vector<TensorEntry> entries;
  for (const ResponseEntry& entry : response.entries) {
    std::optional<TensorEntry> found = queue_.take({response.process_set, response.op, entry.name});
    if (!found) found = stand_in(response, entry);
    if (found) entries.push_back(std::move(*found));
  }
  if (response.kind == Response::Kind::kError) {
    end_entries(std::move(entries), response.status());
    return;
  }
  if (entries.size() != response.entries.size()) {
    // The set has failed here meanwhile, and with it its handles; or the join of this rank, which then no longer takes
    // part in what others agreed on while it did. These do not know that.
    const Status gone = Status::internal(
        fmt::format("{} is not there any more on rank {}", entries.empty() ? "it" : "a part of it", fabric_.rank()));
    end_entries(std::move(entries), gone);
    if (sets_.failure(response.process_set).ok()) {
      on_call_ended_({response.process_set, response.call, gone, in_flight_});
    }
    return;
  }
  if (response.op == OpKind::kJoin) queue_.begin_epoch();
  auto call = std::make_shared<Call>();
  call->priority = next_priority_++;
  // A response that changes the sets has been applied already: it runs in the set of all ranks, which stays.
  call->membership = sets_.find(response.process_set);
  call->response = std::move(response);
  call->entries = std::move(entries);
  if (is_on(timeline_)) timeline_->call_agreed(call->response, call->entries, *call->membership, fabric_);
  Lane& lane = lanes_[call->response.process_set];
  lane.waiting.push_back(std::move(call));
  ++queued_;
  start_what_may(lane);
}

// The operation keeps its place among those that wait until the call has ended well.
void Executor::carry_out_standing(Response response) {
  std::optional<TensorEntry> lent = queue_.lend({response.process_set, response.op, response.entries.front().name});
  if (!lent) {  // its set has failed meanwhile
    on_call_ended_({response.process_set, response.call, {}, in_flight_});
    return;
  }
  auto call = std::make_shared<Call>();
  call->priority = next_priority_++;
  call->membership = sets_.find(response.process_set);
  call->response = std::move(response);
  call->entries.push_back(std::move(*lent));
  if (is_on(timeline_)) timeline_->call_agreed(call->response, call->entries, *call->membership, fabric_);
  statistics_.standing_calls.add(1);
  Lane& lane = lanes_[call->response.process_set];
  start(lane, std::move(call));
}

void Executor::withdraw(const WithdrawnCall& withdrawn) {
  const auto lane = lanes_.find(withdrawn.process_set);
  if (lane == lanes_.end()) return;
  const auto running = lane->second.standing.find(withdrawn.call);
  if (running == lane->second.standing.end()) return;  // it has failed, and its end is on the way to the controller
  Call& call = *running->second;
  const Status closed = queue_.give_back(call.entries.front().request.key);
  call.withdrawn = closed.ok();
  call.context->cancel(closed.ok() ? Status::internal("not all ranks have begun it") : closed);
}

void Executor::discard(const Response& response) {
  const MembershipRef membership = sets_.find(response.process_set);
  if (!membership) return;
  CollectiveContext::Settings settings;
  settings.process_set = response.process_set;
  settings.call = response.call;
  settings.pull_from_bytes = options_.pull_from_bytes;
  settings.buffers = &buffers_;
  CollectiveContext context(loop_, fabric_, membership, std::move(settings));
  AllreduceCall call = allreduce_call(response);
  const ResponseEntry& entry = response.entries.front();
  call.tensors.push_back({nullptr, nullptr, bytes_of(response.dtype, entry.shape) / size_of(response.dtype)});
  discard_standing_allreduce(context, call);
}

// What a rank brings that has joined: nothing that changes the result.
std::optional<TensorEntry> Executor::stand_in(const Response& response, const ResponseEntry& entry) const {
  if (response.kind != Response::Kind::kExecute || !find_op_rule(response.op)->runs_with_joined) return std::nullopt;
  if (!queue_.has({0, OpKind::kJoin, std::string(kJoinName)})) return std::nullopt;
  TensorEntry made;
  made.request.key = {response.process_set, response.op, entry.name};
  made.request.dtype = response.dtype;
  made.request.shape = entry.shape;
  made.request.order = entry.order;
  made.request.more = entry.more;
  made.request.memory = response.memory;
  const MembershipRef membership = sets_.find(response.process_set);
  const std::optional<int> index = membership ? membership->index_of(fabric_.rank()) : std::nullopt;
  const int agreed = index ? device_of(entry, *index) : -1;
  made.device = agreed >= 0 ? agreed : queue_.join_device();
  made.more.resize(entry.more.size());
  return made;
}

FusionLimits Executor::limits() const {
  return {options_.fusion_threshold_bytes, options_.fusion_copy_limit_bytes, options_.small_limit_bytes};
}

void Executor::start_what_may(Lane& lane) {
  while (!lane.waiting.empty()) {
    const std::uint64_t next = lane.waiting.front()->response.call;
    if (!lane.running.empty() && next - lane.running.begin()->first >= kWindow) return;
    CallRef call = std::move(lane.waiting.front());
    lane.waiting.pop_front();
    --queued_;
    start(lane, std::move(call));
  }
}

void Executor::start(Lane& lane, CallRef call) {
  const Response& response = call->response;
  CollectiveContext::Settings settings;
  settings.process_set = response.process_set;
  settings.call = response.call;
  settings.priority = call->priority;
  settings.segment_bytes = options_.segment_bytes;
  settings.pull_from_bytes = options_.pull_from_bytes;
  settings.keep_alive = call;
  settings.buffers = &buffers_;
  if (is_on(timeline_)) {
    const timeline::CallId id{response.process_set, response.call};
    timeline_->call_started(id);
    call->activities = CallActivities(timeline_, id);
    settings.activities = &call->activities;
  }
  call->context = std::make_unique<CollectiveContext>(loop_, fabric_, call->membership, std::move(settings));
  call->begun = loop_.now();
  (is_standing_call(response.call) ? lane.standing : lane.running).emplace(response.call, call);
  ++in_flight_;
  statistics_.collective_calls.add(1);
  const auto failed = lane.failed_early.find(response.call);
  if (failed != lane.failed_early.end()) {
    call->context->cancel(failed->second);
    lane.failed_early.erase(failed);
  }
  loop_.spawn(run(std::move(call)));
}

Task<void> Executor::run(CallRef call) {
  Status status;
  try {
    status = co_await perform(call);
  } catch (const std::exception& error) {
    status = Status::internal(fmt::format("{} failed: {}", name_of(call->response.op), error.what()));
  }
  finish(std::move(call), status);
}

Task<Status> Executor::perform(CallRef call) {
  if (!call->context->cancelled().ok()) co_return call->context->cancelled();
  switch (call->response.op) {
    case OpKind::kBarrier:
      co_return co_await host_barrier(*call->context);
    case OpKind::kProcessSetAdd:
      call->entries.front().handle->output().process_set = call->response.new_process_set;
      co_return Status();
    case OpKind::kProcessSetRemove:
      devices_.forget_set(call->response.new_process_set);
      call->entries.front().handle->output().process_set = call->response.new_process_set;
      co_return Status();
    case OpKind::kJoin:
      call->entries.front().handle->output().last_joined = call->response.root_rank;
      co_return Status();
    default:
      co_return co_await perform_on_tensors(call);
  }
}

// Where the tensors lie chooses who carries it out; all ranks have agreed on that.
Status Executor::choose_backend(Call& call) {
  call.backend = &host_;
  if (call.response.memory == MemoryKind::kHost) return {};
  Result<std::unique_ptr<Backend>> made =
      devices_.begin_call(call.response, call.membership, call.entries, call.priority);
  if (!made) return made.status();
  call.of_device = std::move(made).value();
  call.backend = call.of_device.get();
  return {};
}

Task<Status> Executor::perform_on_tensors(CallRef call) {
  HVD_CO_RETURN_IF_ERROR(choose_backend(*call));
  HVD_CO_RETURN_IF_ERROR(co_await call->backend->begin(*call->context));
  switch (call->response.op) {
    case OpKind::kAllreduce:
      co_return co_await allreduce(call);
    case OpKind::kAllgather:
      co_return co_await allgather(call);
    case OpKind::kBroadcast:
      co_return co_await broadcast(call);
    case OpKind::kReducescatter:
      co_return co_await reducescatter(call);
    case OpKind::kAlltoall:
      co_return co_await alltoall(call);
    default:
      co_return Status::internal("a response names an operation that does not exist");
  }
}

// A tensor that the operation makes: the shape of what went in, with other rows.
Result<OutputTensor> Executor::make_output(Call& call, const TensorType& like, std::int64_t rows) {
  OutputTensor made;
  made.shape = like.shape;
  made.shape.front() = rows;
  const Result<std::int64_t> count = element_count(made.shape);
  if (!count.ok()) return count.status();
  made.bytes = static_cast<std::size_t>(count.value()) * size_of(like.dtype);
  Result<MadeMemory> memory = call.backend->make_output(made.bytes);
  if (!memory) return memory.status();
  made.memory = memory->memory;
  made.block = memory->block;
  call.outputs.push_back(made.memory);  // what carries it out may need it when nobody wants the result any more
  return made;
}

// Where the call reads and writes a tensor; is_read: this rank brings something.
Result<TensorEntry::Memory> Executor::memory_in_agreed_order(Call& call, std::size_t entry, std::size_t tensor,
                                                             bool is_read) {
  const TensorEntry& asked = call.entries[entry];
  const TensorEntry::Memory own = memory_of(asked, tensor);
  const MemoryOrder agreed = order_of(call.response.entries[entry], tensor);
  if (agreed == order_of(asked.request, tensor)) return own;
  if (agreed != kCOrder) return Status::internal("a response names an order of memory that this rank has not said");
  return call.reordering.begin(*call.context, type_of(asked.request, tensor), own, is_read);
}

void Executor::bring_back(Call& call) {
  call.reordering.end(*call.context);
  statistics_.bytes_reordered.add(static_cast<std::int64_t>(call.reordering.bytes()));
}

// Without its tensors.
AllreduceCall Executor::allreduce_call(const Response& response) const {
  AllreduceCall call;
  call.dtype = response.dtype;
  call.reduce_op = response.reduce_op;
  call.prescale = response.prescale;
  call.postscale = response.postscale;
  call.small_limit_bytes = options_.small_limit_bytes;
  return call;
}

// The tensors are those of several entries that were fused, or those of one entry, which is a group.
Task<Status> Executor::allreduce(CallRef call) {
  const Response& response = call->response;
  std::vector<GroupMember> tensors;
  std::vector<TensorEntry::Memory> memory;
  for (std::size_t i = 0; i < call->entries.size(); ++i) {
    const Request& request = call->entries[i].request;
    for (std::size_t t = 0; t <= request.more.size(); ++t) {
      Result<TensorEntry::Memory> placed = memory_in_agreed_order(*call, i, t, /*is_read=*/true);
      if (!placed) co_return placed.status();
      memory.push_back(*placed);
    }
    for_each_tensor(request,
                    [&](DataType dtype, const Shape& shape) { tensors.push_back({dtype, bytes_of(dtype, shape)}); });
  }
  // Fused entries have been found to fit together, and a single tensor is alone; a group is planned here.
  std::vector<std::vector<std::size_t>> runs;
  if (call->entries.front().more.empty()) {
    runs.emplace_back(tensors.size());
    std::iota(runs.front().begin(), runs.front().end(), std::size_t{0});
  } else if (response.reduce_op == ReduceOp::kAdasum) {
    for (std::size_t i = 0; i < tensors.size(); ++i) runs.push_back({i});
  } else {
    runs = plan_group(tensors, limits());
  }
  for (const std::vector<std::size_t>& run : runs) {
    AllreduceCall work = allreduce_call(response);
    work.dtype = tensors[run.front()].dtype;
    const std::size_t element = std::max<std::size_t>(1, size_of(work.dtype));
    for (const std::size_t i : run) {
      work.tensors.push_back({memory[i].input, memory[i].output, tensors[i].bytes / element});
    }
    HVD_CO_RETURN_IF_ERROR(co_await call->backend->allreduce(*call->context, std::move(work)));
  }
  bring_back(*call);
  co_return Status();
}

Task<Status> Executor::allgather(CallRef call) {
  const ResponseEntry& agreed = call->response.entries.front();
  const TensorEntry& entry = call->entries.front();
  const std::vector<TensorType> types = tensors_of(entry.request);
  const auto ranks = static_cast<std::size_t>(call->membership->size());
  OperationOutput& output = entry.handle->output();
  if (agreed.first_dims.size() != types.size() * ranks) {
    co_return Status::internal("a response does not say how many rows each rank has");
  }
  AllgatherCall work;
  work.copy_limit_bytes = options_.fusion_copy_limit_bytes;
  for (std::size_t t = 0; t < types.size(); ++t) {
    const std::size_t row = row_elements(types[t].shape) * size_of(types[t].dtype);
    AllgatherTensor tensor;
    std::int64_t rows = 0;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      const std::int64_t count = agreed.first_dims[t * ranks + rank];
      HVD_CO_RETURN_IF_ERROR(add_rows(rows, count));
      tensor.bytes_by_rank.push_back(static_cast<std::size_t>(count) * row);
    }
    Result<OutputTensor> made = make_output(*call, types[t], rows);
    if (!made) co_return made.status();
    tensor.input = memory_of(entry, t).input;
    tensor.output = made->memory.get();
    work.tensors.push_back(std::move(tensor));
    output.tensors.push_back(std::move(*made));
  }
  co_return co_await call->backend->allgather(*call->context, std::move(work));
}

Task<Status> Executor::reducescatter(CallRef call) {
  const Response& response = call->response;
  const TensorEntry& entry = call->entries.front();
  const std::vector<TensorType> types = tensors_of(entry.request);
  OperationOutput& output = entry.handle->output();
  std::vector<GroupMember> members;
  for (const TensorType& type : types) {
    members.push_back({type.dtype, bytes_of(type.dtype, type.shape)});
    const auto rows = static_cast<std::size_t>(type.shape.front());
    const std::size_t own = scattered_rows(rows, call->context->size(), call->context->rank());
    Result<OutputTensor> made = make_output(*call, type, static_cast<std::int64_t>(own));
    if (!made) co_return made.status();
    output.tensors.push_back(std::move(*made));
  }
  for (const std::vector<std::size_t>& run : plan_group(members, limits())) {
    ReducescatterCall work;
    work.dtype = types[run.front()].dtype;
    work.reduce_op = response.reduce_op;
    work.prescale = response.prescale;
    work.postscale = response.postscale;
    for (const std::size_t i : run) {
      work.tensors.push_back({memory_of(entry, i).input, output.tensors[i].memory.get(),
                              static_cast<std::size_t>(types[i].shape.front()), row_elements(types[i].shape)});
    }
    HVD_CO_RETURN_IF_ERROR(co_await call->backend->reducescatter(*call->context, std::move(work)));
  }
  co_return Status();
}

// Ranks tell each other first how many rows come: so the agreement is the same whatever the splits.
Task<Status> Executor::alltoall(CallRef call) {
  const TensorEntry& entry = call->entries.front();
  const TensorType type{entry.request.dtype, entry.request.shape};
  OperationOutput& output = entry.handle->output();
  std::vector<std::int64_t> to = entry.request.splits;
  if (!entry.request.has_splits) {
    const int ranks = call->context->size();
    to.assign(static_cast<std::size_t>(ranks), type.shape.front() / ranks);
  }
  HVD_CO_RETURN_IF_ERROR(co_await host_exchange_counts(*call->context, to, output.received));
  std::int64_t rows = 0;
  for (const std::int64_t count : output.received) {
    HVD_CO_RETURN_IF_ERROR(add_rows(rows, count));
  }
  Result<OutputTensor> made = make_output(*call, type, rows);
  if (!made) co_return made.status();
  output.tensors.push_back(std::move(*made));
  const std::size_t row = row_elements(type.shape) * size_of(type.dtype);
  AlltoallCall work{entry.input, output.tensors.front().memory.get(), {}, {}};
  for (const std::int64_t count : to) work.bytes_to.push_back(static_cast<std::size_t>(count) * row);
  for (const std::int64_t count : output.received) work.bytes_from.push_back(static_cast<std::size_t>(count) * row);
  co_return co_await call->backend->alltoall(*call->context, std::move(work));
}

Task<Status> Executor::broadcast(CallRef call) {
  const Response& response = call->response;
  const TensorEntry& entry = call->entries.front();
  const std::optional<int> root = call->membership->index_of(response.root_rank);
  if (!root) co_return Status::internal("a response names a root rank outside its process set");
  const bool is_root = call->context->rank() == *root;
  Result<TensorEntry::Memory> placed = memory_in_agreed_order(*call, /*entry=*/0, /*tensor=*/0, is_root);
  if (!placed) co_return placed.status();
  const BroadcastCall work{placed->input, placed->output, bytes_of(entry.request.dtype, entry.request.shape), *root};
  HVD_CO_RETURN_IF_ERROR(co_await call->backend->broadcast(*call->context, work));
  bring_back(*call);
  co_return Status();
}

void Executor::finish(CallRef call, Status status) {
  const ProcessSetId process_set = call->response.process_set;
  Lane& lane = lanes_[process_set];
  --in_flight_;
  const bool is_standing = is_standing_call(call->response.call);
  if (is_standing) {
    lane.standing.erase(call->response.call);
    if (call->withdrawn) {
      statistics_.standing_calls_withdrawn.add(1);
      call->context->cancel(status);
      call->context.reset();
      if (is_on(timeline_)) {
        timeline_->call_withdrawn({process_set, call->response.call}, call->entries.front().request.key);
      }
      on_call_ended_({process_set, call->response.call, {}, in_flight_, /*withdrawn=*/true});
      return;
    }
    // What was lent is taken, unless it has been ended with its set.
    std::optional<TensorEntry> entry = queue_.take(call->entries.front().request.key);
    call->entries.clear();
    if (entry) call->entries.push_back(std::move(*entry));
  } else {
    lane.running.erase(call->response.call);
  }
  // Its part may be in line all the same, with something that another rank has failed to put in line.
  const bool is_on_device = call->response.memory != MemoryKind::kHost;
  if (status.ok() && is_on_device && !call->context->cancelled().ok()) status = call->context->cancelled();
  Status told = status;
  if (is_standing && !status.ok()) {  // perhaps no other rank ever began it: then the end of the job has ended it
    if (Status closed = queue_.closing_reason(); !closed.ok()) told = std::move(closed);
  }
  // What all ranks find alike in what they have agreed on is no news to them, and leaves them in step.
  const bool found_alike = status.code() == StatusCode::kPrecondition && is_on_device;
  const bool has_set = sets_.find(process_set) != nullptr;  // otherwise no later call can be out of step
  const bool may_part = !found_alike && has_set && call->membership->size() > 1;
  if (!status.ok() && may_part) devices_.call_failed(call->response, status);
  // From here on a device may still be at work on it, which holds it then.
  const Result<DeviceMarkRef> launched =
      call->backend != nullptr ? call->backend->end(status, call) : Result<DeviceMarkRef>(DeviceMarkRef());
  if (status.ok() && !launched) {
    status = told = launched.status();
    if (may_part) devices_.call_failed(call->response, status);
  }
  if (status.ok()) {
    if (call->response.memory == MemoryKind::kDevice) keep_in_line(lane, call);
    for (const TensorEntry& entry : call->entries) {
      if (call->response.op != OpKind::kAllreduce || entry.handle == nullptr) continue;
      for_each_tensor(entry.request, [&](DataType dtype, const Shape& shape) {
        statistics_.bytes_reduced.add(static_cast<std::int64_t>(bytes_of(dtype, shape)));
      });
    }
  } else {
    call->context->cancel(status);  // whatever the algorithm left in flight ends before the memory is given back
    if (status.code() != StatusCode::kInternal) told = Status::internal(status.text());
  }
  call->context.reset();
  if (is_on(timeline_)) timeline_->call_ended({process_set, call->response.call}, told);
  for (TensorEntry& entry : call->entries) {
    if (entry.handle != nullptr && launched) entry.handle->output().launched = launched.value();
    end_entry(entry, told.ok() ? told
                               : Status(told.code(), fmt::format("{} '{}': {}", name_of(call->response.op),
                                                                 entry.request.key.name, told.text())));
    // A device may still be at work on what the entry keeps alive.
    if (call->response.memory == MemoryKind::kHost) queue_.reuse(std::move(entry));
  }
  on_call_ended_({process_set, call->response.call, found_alike ? Status() : status, in_flight_});
  call.reset();
  start_what_may(lane);
}

void Executor::keep_in_line(Lane& lane, const CallRef& call) {
  while (!lane.in_line.empty() && lane.in_line.front().expired()) lane.in_line.pop_front();
  lane.in_line.push_back(call);
}

void Executor::end_entry(TensorEntry& entry, const Status& status) {
  if (entry.handle == nullptr) return;  // of a rank that has joined: nobody waits for it
  (status.ok() ? statistics_.operations_done : statistics_.operations_failed).add(1);
  entry.handle->complete(status);
  entry.handle.reset();
}

void Executor::end_entries(std::vector<TensorEntry> entries, const Status& reason) {
  for (TensorEntry& entry : entries) {
    if (is_on(timeline_)) timeline_->operation_ended(entry.request.key, reason);
    end_entry(entry, reason);
  }
}

void Executor::fail_set(ProcessSetId process_set, const Status& reason) {
  devices_.fail_set(process_set, reason);
  const auto found = lanes_.find(process_set);
  if (found == lanes_.end()) return;
  Lane& lane = found->second;
  for (CallRef& call : std::exchange(lane.waiting, {})) {
    if (is_on(timeline_)) timeline_->call_ended({process_set, call->response.call}, reason);
    --queued_;
    end_entries(std::move(call->entries), reason);
  }
  for (auto& [number, call] : lane.running) call->context->cancel(reason);
  for (auto& [number, call] : lane.standing) call->context->cancel(reason);
}

void Executor::fail_rank(int rank, const Status& reason) {
  devices_.fail_rank(rank, reason);
  for (auto& [id, lane] : lanes_) {
    const auto has_it = [rank](const CallRef& call) { return call->membership->contains(rank); };
    // All calls of a set have the same members.
    const bool waits = !lane.waiting.empty() && has_it(lane.waiting.front());
    const bool runs = !lane.running.empty() && has_it(lane.running.begin()->second);
    const bool stands = !lane.standing.empty() && has_it(lane.standing.begin()->second);
    if (waits || runs || stands) fail_set(id, reason);
  }
}

void Executor::fail_all(const Status& reason) {
  for (auto& [id, lane] : lanes_) fail_set(id, reason);
}

void Executor::give_up_call(const CallInFlight& call, const Status& reason) {
  devices_.fail_call(call.process_set, call.call, reason);
  const auto lane = lanes_.find(call.process_set);
  if (lane == lanes_.end()) return;
  if (call.on_device) {  // its handles have ended well, so that only the set's later calls can tell
    std::erase_if(lane->second.in_line, [&](const std::weak_ptr<Call>& held) {
      const CallRef one = held.lock();
      return !one || one->response.call == call.call;
    });
    on_call_ended_({call.process_set, call.call, reason, in_flight_});
    return;
  }
  const auto& calls = is_standing_call(call.call) ? lane->second.standing : lane->second.running;
  if (const auto found = calls.find(call.call); found != calls.end()) found->second->context->cancel(reason);
}

TimePoint Executor::oldest_call() const {
  TimePoint oldest = kNever;
  for (const auto& [id, lane] : lanes_) {
    if (!lane.running.empty()) oldest = std::min(oldest, lane.running.begin()->second->begun);  // they begin in order
    for (const auto& [number, call] : lane.standing) oldest = std::min(oldest, call->begun);
    for (const std::weak_ptr<Call>& held : lane.in_line) {
      const CallRef call = held.lock();
      if (!call) continue;
      oldest = std::min(oldest, call->begun);
      break;
    }
  }
  return oldest;
}

std::vector<CallInFlight> Executor::calls_begun_before(TimePoint time) const {
  std::vector<CallInFlight> found;
  const auto look_at = [&](const Call& call) {
    if (call.begun >= time) return;
    const Response& response = call.response;
    CallInFlight& one = found.emplace_back();
    one.process_set = response.process_set;
    one.call = response.call;
    one.op = response.op;
    one.name = response.entries.front().name;
    one.count = response.entries.size();
    one.begun = call.begun;
    one.on_device = call.context == nullptr;
    if (call.context != nullptr) one.awaited = call.context->awaited();
  };
  for (const auto& [id, lane] : lanes_) {
    for (const auto& [number, call] : lane.running) look_at(*call);
    for (const auto& [number, call] : lane.standing) look_at(*call);
    for (const std::weak_ptr<Call>& held : lane.in_line) {
      if (const CallRef call = held.lock()) look_at(*call);
    }
  }
  return found;
}

void Executor::fail_call(const FailedCall& failed) {
  devices_.fail_call(failed.process_set, failed.call, failed.reason);
  const auto found = lanes_.find(failed.process_set);
  if (found == lanes_.end()) return;  // no call of that set has come here
  Lane& lane = found->second;
  if (is_standing_call(failed.call)) {
    const auto standing = lane.standing.find(failed.call);
    if (standing != lane.standing.end()) {
      standing->second->context->cancel(failed.reason);
    } else {
      lane.failed_early[failed.call] = failed.reason;  // perhaps this rank begins it yet
    }
    return;
  }
  const auto running = lane.running.find(failed.call);
  if (running != lane.running.end()) {
    running->second->context->cancel(failed.reason);
    return;
  }
  for (const CallRef& call : lane.waiting) {
    if (call->response.call == failed.call) lane.failed_early[failed.call] = failed.reason;
  }
}

}  // namespace hvd
