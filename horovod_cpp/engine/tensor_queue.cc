#include "horovod_cpp/engine/tensor_queue.h"

#include <fmt/format.h>

#include <utility>

namespace hvd {

Status TensorQueue::push(TensorEntry entry, const std::string& call_site) {
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
      const auto age = std::chrono::duration_cast<std::chrono::milliseconds>(entry.enqueued - first->second.enqueued);
      return Status::invalid_argument(
          fmt::format("Requested to {} a tensor with the same name as another tensor that is currently being "
                      "processed: '{}' was handed over {} ms ago and is not finished. Give each tensor in flight its "
                      "own name.",
                      name_of(key.op), key.name, age.count()));
    }
    if (!call_site.empty()) {
      const auto [site, is_new] =
          state.call_sites.try_emplace(call_site, static_cast<std::uint32_t>(state.call_sites.size() + 1));
      if (is_new) state.fresh_call_sites.push_back({site->second, call_site});
      entry.request.call_site = site->second;
    }
    if (key.op == OpKind::kJoin) state.joining = true;
    state.fresh.push_back(key);
    OperationKey place = key;
    state.waiting.emplace(std::move(place), std::move(entry));
    return {};
  });
}

RequestsEnqueued TensorQueue::drain() {
  return state_.with([](State& state) {
    RequestsEnqueued drained;
    drained.call_sites = std::exchange(state.fresh_call_sites, {});
    drained.requests.reserve(state.fresh.size());
    for (const OperationKey& key : std::exchange(state.fresh, {})) {
      drained.requests.push_back(state.waiting.at(key).request);
    }
    return drained;
  });
}

bool TensorQueue::has_new() const {
  return state_.with([](const State& state) { return !state.fresh.empty(); });
}

bool TensorQueue::has(const OperationKey& key) const {
  return state_.with([&](const State& state) { return state.waiting.contains(key); });
}

std::optional<TimePoint> TensorQueue::enqueued(const OperationKey& key) const {
  return state_.with([&](const State& state) -> std::optional<TimePoint> {
    const auto found = state.waiting.find(key);
    if (found == state.waiting.end()) return std::nullopt;
    return found->second.enqueued;
  });
}

int TensorQueue::join_device() const {
  return state_.with([](const State& state) {
    const auto join = state.waiting.find({0, OpKind::kJoin, std::string(kJoinName)});
    return join == state.waiting.end() ? -1 : join->second.device;
  });
}

void TensorQueue::begin_epoch() {
  state_.with([](State& state) {
    state.unnamed.clear();
    ++state.epoch;
  });
}

std::optional<TensorEntry> TensorQueue::take(const OperationKey& key) {
  return state_.with([&](State& state) -> std::optional<TensorEntry> {
    const auto found = state.waiting.find(key);
    if (found == state.waiting.end()) return std::nullopt;
    std::optional<TensorEntry> entry(std::move(found->second));
    state.waiting.erase(found);
    if (key.op == OpKind::kJoin) state.joining = false;
    return entry;
  });
}

template <typename Wanted>
std::vector<TensorEntry> TensorQueue::take_if(State& state, Wanted wanted) {
  std::vector<TensorEntry> taken;
  for (auto place = state.waiting.begin(); place != state.waiting.end();) {
    if (!wanted(place->second)) {
      ++place;
      continue;
    }
    std::erase(state.fresh, place->first);
    taken.push_back(std::move(place->second));
    place = state.waiting.erase(place);
  }
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
    state.fresh.clear();
    std::vector<TensorEntry> taken;
    for (auto& [key, entry] : state.waiting) taken.push_back(std::move(entry));
    state.waiting.clear();
    return taken;
  });
}

std::vector<OperationKey> TensorQueue::waiting_since_before(TimePoint time) const {
  return state_.with([&](const State& state) {
    std::vector<OperationKey> keys;
    for (const auto& [key, entry] : state.waiting) {
      if (entry.enqueued < time && key.op != OpKind::kJoin) keys.push_back(key);
    }
    return keys;
  });
}

TimePoint TensorQueue::oldest() const {
  return state_.with([](const State& state) {
    TimePoint oldest = kNever;
    for (const auto& [key, entry] : state.waiting) {
      if (key.op != OpKind::kJoin) oldest = std::min(oldest, entry.enqueued);
    }
    return oldest;
  });
}

}  // namespace hvd
