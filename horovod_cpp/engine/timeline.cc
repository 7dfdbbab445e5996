#include "horovod_cpp/engine/timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

namespace hvd {
namespace {

constexpr std::string_view kRankPlace = "{rank}";

std::string with_rank(std::string path, int rank) {
  for (std::size_t at = path.find(kRankPlace); at != std::string::npos; at = path.find(kRankPlace, at)) {
    path.replace(at, kRankPlace.size(), std::to_string(rank));
  }
  return path;
}

timeline::Operand operand_of(const Request& request) {
  timeline::Operand operand{request.key, request.dtype, request.shape, 1 + request.more.size(), 0};
  for_each_tensor(request, [&](DataType dtype, const Shape& shape) { operand.bytes += bytes_of(dtype, shape); });
  return operand;
}

timeline::Operand operand_of(const Response& response, const ResponseEntry& entry) {
  timeline::Operand operand{
      {response.process_set, response.op, entry.name}, response.dtype, entry.shape, 1 + entry.more.size(), 0};
  for_each_tensor(response, entry,
                  [&](DataType dtype, const Shape& shape) { operand.bytes += bytes_of(dtype, shape); });
  return operand;
}

// "shared memory", or "shared memory+TCP".
std::string transports_to(const Membership& membership, const Fabric& fabric) {
  std::vector<std::string_view> names;
  for (const int rank : membership.ranks) {
    if (rank == fabric.rank()) continue;
    const std::string_view name = fabric.data_route(rank).name();
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return fmt::format("{}", fmt::join(names, "+"));
}

}  // namespace

Timeline::~Timeline() { stop(); }

Status Timeline::start(const std::string& path, bool mark_cycles) {
  if (path.empty()) return Status::invalid_argument("a timeline needs the path of a file to be written");
  const std::string own_path = with_rank(path, rank_);
  if (rank_ != 0 && own_path == path) return {};
  const std::scoped_lock changing(changing_);
  marks_cycles_.store(mark_cycles, std::memory_order_relaxed);  // relaxed: from about now on
  if (on() && writer_ != nullptr && writer_->path() == own_path) return {};
  Result<timeline::File> file = timeline::File::create(own_path);
  if (!file) return file.status();
  queue_.close();
  writer_.reset();
  timeline::Origin origin;
  origin.start = clock_.now();
  origin.micros_since_epoch =
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  origin.rank = rank_;
  origin.size = size_;
  queue_.open();
  try {
    writer_ = std::make_unique<timeline::Writer>(queue_, std::move(file).value(), origin);
  } catch (const std::system_error& error) {
    queue_.close();
    return Status::internal(fmt::format("the timeline gets no thread to write with: {}", error.what()));
  }
  return {};
}

void Timeline::stop() {
  const std::scoped_lock changing(changing_);
  queue_.close();
  writer_.reset();
}

void Timeline::note(decltype(timeline::Record::what) what) { queue_.push({clock_.now(), std::move(what)}); }

void Timeline::taken_up(const RequestsEnqueued& fresh, const TensorQueue& queue) {
  if (marks_cycles_.load(std::memory_order_relaxed)) note(timeline::CycleStarted{});
  for (const Request& request : fresh.requests) {
    queue_.push({queue.enqueued(request.key).value_or(clock_.now()), timeline::Enqueued{request.key}});
  }
}

void Timeline::rank_ready(const OperationKey& key, int rank) { note(timeline::RankReady{key, rank}); }

void Timeline::answered(const Response& response, bool takes_part) {
  const bool execute = response.kind == Response::Kind::kExecute;
  for (const ResponseEntry& entry : response.entries) {
    if (!takes_part) {
      operation_ended({response.process_set, response.op, entry.name}, response.status());
    } else if (execute) {
      note(timeline::Agreed{operand_of(response, entry)});
    }
  }
}

void Timeline::call_agreed(const Response& response, const std::vector<TensorEntry>& entries,
                           const Membership& membership, const Fabric& fabric) {
  timeline::CallAgreed fact;
  fact.call = {response.process_set, response.call};
  fact.operands.reserve(entries.size());
  for (const TensorEntry& entry : entries) fact.operands.push_back(operand_of(entry.request));
  fact.transports = response.memory == MemoryKind::kHost ? transports_to(membership, fabric) : "device";
  note(std::move(fact));
}

void Timeline::call_started(timeline::CallId call) { note(timeline::CallStarted{call}); }

void Timeline::activity_begun(timeline::CallId call, ActivityKind kind, std::string_view algorithm) {
  note(timeline::ActivityBegun{call, kind, algorithm});
}

void Timeline::activity_ended(timeline::CallId call) { note(timeline::ActivityEnded{call}); }

void Timeline::call_ended(timeline::CallId call, const Status& status) {
  note(timeline::CallFinished{call, status.text()});
}

void Timeline::call_withdrawn(timeline::CallId call, const OperationKey& key) {
  note(timeline::CallFinished{call, "withdrawn: not all ranks had begun it"});
  note(timeline::Enqueued{key});
}

void Timeline::operation_ended(const OperationKey& key, const Status& status) {
  note(timeline::OperationEnded{key, status.text()});
}

}  // namespace hvd
