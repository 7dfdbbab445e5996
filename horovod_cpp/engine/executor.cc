#include "horovod_cpp/engine/executor.h"

#include <fmt/format.h>

#include <cstring>
#include <numeric>
#include <utility>

#include "horovod_cpp/engine/fusion_planner.h"
#include "ops/host_backend.h"

namespace hvd {
namespace {

// A set's oldest running call and its newest are never further apart, so that two calls in flight never have the same
// channel number (they come round after 65,536).
constexpr std::uint64_t kWindow = 1024;

constexpr bool is_collective(OpKind op) { return op != OpKind::kProcessSetAdd && op != OpKind::kProcessSetRemove; }

std::size_t bytes_of(const Response& response, const Shape& shape) {
  const Result<std::int64_t> count = element_count(shape);
  return count.ok() ? static_cast<std::size_t>(count.value()) * size_of(response.dtype) : 0;
}

}  // namespace

Executor::Executor(Loop& loop, Fabric& fabric, const ProcessSetTable& sets, TensorQueue& queue, const Options& options,
                   std::function<void(CallEnded)> on_call_ended)
    : loop_(loop),
      fabric_(fabric),
      sets_(sets),
      queue_(queue),
      options_(options),
      on_call_ended_(std::move(on_call_ended)) {}

void Executor::carry_out(Response response) {
  std::vector<TensorEntry> entries;
  for (const ResponseEntry& entry : response.entries) {
    std::optional<TensorEntry> found = queue_.take({response.process_set, response.op, entry.name});
    if (found) entries.push_back(std::move(*found));
  }
  if (response.kind == Response::Kind::kError) {
    end_entries(std::move(entries), response.status());
    return;
  }
  if (entries.size() != response.entries.size()) {  // the set has failed here meanwhile, and with it its handles
    end_entries(std::move(entries), Status::internal("a part of a fused call is not there any more"));
    return;
  }
  auto call = std::make_shared<Call>();
  call->priority = next_priority_++;
  // A response that changes the sets has been applied already: it runs in the set of all ranks, which stays.
  call->membership = sets_.find(response.process_set);
  call->response = std::move(response);
  call->entries = std::move(entries);
  Lane& lane = lanes_[call->response.process_set];
  lane.waiting.push_back(std::move(call));
  ++queued_;
  start_what_may(lane);
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
  settings.keep_alive = call;
  settings.buffers = &buffers_;
  call->context = std::make_unique<CollectiveContext>(loop_, fabric_, call->membership, std::move(settings));
  lane.running.emplace(response.call, call);
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
    case OpKind::kAllreduce:
      co_return co_await allreduce(call);
    case OpKind::kAllgather:
      co_return co_await allgather(call);
    case OpKind::kBroadcast:
      co_return co_await broadcast(call);
    case OpKind::kBarrier:
      co_return co_await host_barrier(*call->context);
    case OpKind::kProcessSetAdd:
    case OpKind::kProcessSetRemove:
      call->entries.front().handle->output().process_set = call->response.new_process_set;
      co_return Status();
  }
  co_return Status::internal("a response names an operation that does not exist");
}

Task<Status> Executor::allreduce(CallRef call) {
  const Response& response = call->response;
  AllreduceCall work;
  work.dtype = response.dtype;
  work.reduce_op = response.reduce_op;
  work.prescale = response.prescale;
  work.postscale = response.postscale;
  work.small_limit_bytes = options_.small_limit_bytes;
  const std::size_t element = size_of(response.dtype);
  for (const TensorEntry& entry : call->entries) {
    work.tensors.push_back({entry.input, entry.output, bytes_of(response, entry.request.shape) / element});
  }
  if (const std::size_t bytes = fusion_bytes(work); bytes > 0) {
    call->fusion = buffers_.lease(bytes);
    if (!call->fusion) co_return Status::internal(fmt::format("no memory for a fusion buffer of {} bytes", bytes));
    work.fusion = {call->fusion.get(), bytes};
  }
  co_return co_await host_allreduce(*call->context, std::move(work));
}

Task<Status> Executor::allgather(CallRef call) {
  const Response& response = call->response;
  TensorEntry& entry = call->entries.front();
  const ResponseEntry& agreed = response.entries.front();
  Shape row = entry.request.shape;
  row.front() = 1;
  const std::size_t row_bytes = bytes_of(response, row);
  std::vector<std::size_t> bytes_by_rank;
  std::int64_t rows = 0;
  for (const std::int64_t count : agreed.first_dims) {
    bytes_by_rank.push_back(static_cast<std::size_t>(count) * row_bytes);
    rows += count;
  }
  OperationOutput& output = entry.handle->output();
  output.bytes = std::accumulate(bytes_by_rank.begin(), bytes_by_rank.end(), std::size_t{0});
  output.owned = allocate_host(output.bytes);
  if (!output.owned) co_return Status::internal(fmt::format("no memory for a result of {} bytes", output.bytes));
  output.data = output.owned.get();
  output.shape = entry.request.shape;
  output.shape.front() = rows;
  co_return co_await host_allgather(*call->context, entry.input, output.data, std::move(bytes_by_rank));
}

Task<Status> Executor::broadcast(CallRef call) {
  const Response& response = call->response;
  const TensorEntry& entry = call->entries.front();
  const std::optional<int> root = call->membership->index_of(response.root_rank);
  if (!root) co_return Status::internal("a response names a root rank outside its process set");
  co_return co_await host_broadcast(*call->context, entry.input, entry.output, bytes_of(response, entry.request.shape),
                                    *root);
}

void Executor::finish(CallRef call, const Status& status) {
  const ProcessSetId process_set = call->response.process_set;
  Lane& lane = lanes_[process_set];
  lane.running.erase(call->response.call);
  --in_flight_;
  Status told = status;
  if (status.ok()) {
    for (const TensorEntry& entry : call->entries) {
      if (call->response.op == OpKind::kAllreduce) {
        statistics_.bytes_reduced.add(static_cast<std::int64_t>(bytes_of(call->response, entry.request.shape)));
      }
    }
  } else {
    call->context->cancel(status);  // whatever the algorithm left in flight ends before the memory is given back
    if (status.code() != StatusCode::kInternal) told = Status::internal(status.text());
  }
  call->context.reset();
  for (TensorEntry& entry : call->entries) {
    end_entry(entry, told.ok() ? told
                               : Status(told.code(), fmt::format("{} '{}': {}", name_of(call->response.op),
                                                                 entry.request.key.name, told.text())));
  }
  on_call_ended_({process_set, call->response.call, status, in_flight_});
  call.reset();
  start_what_may(lane);
}

void Executor::end_entry(TensorEntry& entry, const Status& status) {
  (status.ok() ? statistics_.operations_done : statistics_.operations_failed).add(1);
  entry.handle->complete(status);
  entry.handle.reset();
}

void Executor::end_entries(std::vector<TensorEntry> entries, const Status& reason) {
  for (TensorEntry& entry : entries) end_entry(entry, reason);
}

void Executor::fail_set(ProcessSetId process_set, const Status& reason) {
  const auto found = lanes_.find(process_set);
  if (found == lanes_.end()) return;
  Lane& lane = found->second;
  for (CallRef& call : std::exchange(lane.waiting, {})) {
    --queued_;
    end_entries(std::move(call->entries), reason);
  }
  for (auto& [number, call] : lane.running) call->context->cancel(reason);
}

void Executor::fail_rank(int rank, const Status& reason) {
  for (auto& [id, lane] : lanes_) {
    const auto has_it = [rank](const CallRef& call) { return call->membership->contains(rank); };
    // All calls of a set have the same members.
    const bool waits = !lane.waiting.empty() && has_it(lane.waiting.front());
    const bool runs = !lane.running.empty() && has_it(lane.running.begin()->second);
    if (waits || runs) fail_set(id, reason);
  }
}

void Executor::fail_all(const Status& reason) {
  for (auto& [id, lane] : lanes_) fail_set(id, reason);
}

void Executor::fail_call(const FailedCall& failed) {
  const auto found = lanes_.find(failed.process_set);
  if (found == lanes_.end()) return;  // no call of that set has come here
  Lane& lane = found->second;
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
