#include "horovod_cpp/engine/tensor_queue.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace hvd {

TensorEntry TensorQueue::blank() { return spare_entries_.take().value_or(TensorEntry()); }

void TensorQueue::reuse(TensorEntry entry) {
  TensorEntry blank;
  blank.request.key.name = std::move(entry.request.key.name);
  blank.request.shape = std::move(entry.request.shape);
  blank.request.key.name.clear();
  blank.request.shape.clear();
  spare_entries_.keep(std::move(blank));
}

Status TensorQueue::push(TensorEntry entry, const CallSite& call_site) {
  return state_.with([&](State& state) -> Status {
    if (!state.closed.ok()) return state.closed;
    OperationKey& key = entry.request.key;
    if (key.op != OpKind::kJoin && state.joining) {
      return Status::precondition(fmt::format(
          "{}: this rank has joined, having no more data, and not all ranks have joined yet", operation_text(key)));
    }
    if (key.name.empty()) key.name = generated_name(state.unnamed[{key.process_set, key.op}]++, state.epoch);
    const auto first = state.waiting.find(key);
    if (first != state.waiting.end()) {
      const auto age = std::chrono::duration_cast<std::chrono::milliseconds>(entry.enqueued - first->enqueued);
      return Status::invalid_argument(
          fmt::format("Requested to {} a tensor with the same name as another tensor that is currently being "
                      "processed: '{}' was handed over {} ms ago and is not finished. Give each tensor in flight its "
                      "own name.",
                      name_of(key.op), key.name, age.count()));
    }
    if (!call_site.file.empty()) entry.request.call_site = intern(state, call_site);
    if (key.op == OpKind::kJoin) state.joining = true;
    if (std::optional<Waiting::node_type> node = spare_nodes_.take()) {
      node->value() = std::move(entry);
      state.fresh.push_back(state.waiting.insert(std::move(*node)).position);
    } else {
      state.fresh.push_back(state.waiting.insert(std::move(entry)).first);
    }
    has_new_.store(true);
    return {};
  });
}

std::uint32_t TensorQueue::intern(State& state, const CallSite& call_site) {
  const auto known = state.call_sites.find(std::pair(call_site.file, call_site.line));
  if (known != state.call_sites.end()) return known->second;
  const auto id = static_cast<std::uint32_t>(state.call_sites.size() + 1);
  state.call_sites.emplace(std::pair(std::string(call_site.file), call_site.line), id);
  state.fresh_call_sites.push_back({id, fmt::format("{}:{}", call_site.file, call_site.line)});
  return id;
}

RequestsEnqueued TensorQueue::drain() {
  RequestsEnqueued drained;
  taken_up_.clear();
  state_.with([&](State& state) {
    drained.call_sites = std::exchange(state.fresh_call_sites, {});
    taken_up_.swap(state.fresh);
    has_new_.store(false);
  });
  // Without the lock: entries stay where they are, and as they are, until the holder of the Turn takes them.
  drained.requests.reserve(taken_up_.size());
  for (const Waiting::const_iterator place : taken_up_) drained.requests.push_back(place->request);
  return drained;
}

bool TensorQueue::has(const OperationKey& key) const {
  return state_.with([&](const State& state) { return state.waiting.contains(key); });
}

std::optional<TimePoint> TensorQueue::enqueued(const OperationKey& key) const {
  return state_.with([&](const State& state) -> std::optional<TimePoint> {
    const auto found = state.waiting.find(key);
    if (found == state.waiting.end()) return std::nullopt;
    return found->enqueued;
  });
}

int TensorQueue::join_device() const {
  return state_.with([](const State& state) {
    const auto join = state.waiting.find(OperationKey{0, OpKind::kJoin, std::string(kJoinName)});
    return join == state.waiting.end() ? -1 : join->device;
  });
}

void TensorQueue::begin_epoch() {
  state_.with([](State& state) {
    state.unnamed.clear();
    ++state.epoch;
  });
}

std::optional<TensorEntry> TensorQueue::lend(const OperationKey& key) {
  return state_.with([&](State& state) -> std::optional<TensorEntry> {
    const auto found = state.waiting.find(key);
    if (found == state.waiting.end()) return std::nullopt;
    state.lent.push_back(found);
    TensorEntry copy = *found;
    copy.handle.reset();
    return copy;
  });
}

Status TensorQueue::give_back(const OperationKey& key) {
  return state_.with([&](State& state) -> Status {
    if (!state.closed.ok()) return state.closed;
    std::erase(state.lent, state.waiting.find(key));
    return {};
  });
}

std::optional<TensorEntry> TensorQueue::take(const OperationKey& key) {
  return state_.with([&](State& state) -> std::optional<TensorEntry> {
    const auto found = state.waiting.find(key);
    if (found == state.waiting.end()) return std::nullopt;
    if (key.op == OpKind::kJoin) state.joining = false;
    return take_out(state, found);
  });
}

TensorEntry TensorQueue::take_out(State& state, Waiting::const_iterator place) {
  std::erase(state.lent, place);
  Waiting::node_type node = state.waiting.extract(place);
  TensorEntry entry = std::move(node.value());
  spare_nodes_.keep(std::move(node));
  return entry;
}

template <typename Wanted>
std::vector<TensorEntry> TensorQueue::take_if(State& state, Wanted wanted) {
  std::vector<TensorEntry> taken;
  for (auto place = state.waiting.begin(); place != state.waiting.end();) {
    const auto here = place++;
    if (!wanted(*here)) continue;
    std::erase(state.fresh, here);
    taken.push_back(take_out(state, here));
  }
  has_new_.store(!state.fresh.empty());
  return taken;
}

std::vector<TensorEntry> TensorQueue::take_set(ProcessSetId process_set) {
  return state_.with([&](State& state) {
    if (process_set == 0) state.joining = false;
    return take_if(state, [&](const TensorEntry& entry) { return entry.request.key.process_set == process_set; });
  });
}

std::vector<TensorEntry> TensorQueue::take_on_devices(ProcessSetId process_set) {
  return state_.with([&](State& state) {
    return take_if(state, [&](const TensorEntry& entry) {
      return entry.request.key.process_set == process_set && entry.request.memory != MemoryKind::kHost;
    });
  });
}

std::vector<TensorEntry> TensorQueue::close(const Status& reason) {
  return state_.with([&](State& state) {
    state.closed = reason;
    return take_if(state, [&](const TensorEntry& entry) {
      return std::none_of(state.lent.begin(), state.lent.end(), [&](auto place) { return &*place == &entry; });
    });
  });
}

Status TensorQueue::closing_reason() const {
  return state_.with([](const State& state) { return state.closed; });
}

std::vector<OperationKey> TensorQueue::waiting_since_before(TimePoint time) const {
  return state_.with([&](const State& state) {
    std::vector<OperationKey> keys;
    for (const TensorEntry& entry : state.waiting) {
      const OperationKey& key = entry.request.key;
      if (entry.enqueued < time && key.op != OpKind::kJoin) keys.push_back(key);
    }
    return keys;
  });
}

TimePoint TensorQueue::oldest() const {
  return state_.with([](const State& state) {
    TimePoint oldest = kNever;
    for (const TensorEntry& entry : state.waiting) {
      if (entry.request.key.op != OpKind::kJoin) oldest = std::min(oldest, entry.enqueued);
    }
    return oldest;
  });
}

}  // namespace hvd
