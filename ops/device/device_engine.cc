#include "ops/device/device_engine.h"

#include <algorithm>
#include <utility>

#include "common/guarded.h"
#include "common/log.h"

namespace hvd {
namespace {

// Nobody waits for what is learnt there: memory comes back a little later, and a failure is told a little later.
constexpr Duration kFirstPause = std::chrono::microseconds(100);
constexpr Duration kLongestPause = std::chrono::milliseconds(2);

// Never destroyed, and still to be found: no leak to those who look for leaks.
template <typename T>
void leave_to_process(T left) {
  static auto* const all = new Guarded<std::vector<T>>;
  all->with([&](std::vector<T>& others) { others.push_back(std::move(left)); });
}

}  // namespace

DeviceEngine::DeviceEngine(Loop& loop, DeviceRuntime& runtime)
    : loop_(loop), runtime_(runtime), events_(runtime), memory_(runtime), order_(loop) {}

DeviceEngine::~DeviceEngine() {
  abandon();
  if (left_) return;
  for (const auto& [key, stream] : streams_) runtime_.destroy_stream(key.first, stream);
}

Result<DeviceStream> DeviceEngine::stream(int device, bool captured) {
  const std::pair key(device, captured);
  const auto known = streams_.find(key);
  if (known != streams_.end()) return known->second;
  Result<DeviceStream> made = runtime_.create_stream(device);
  if (made) streams_.emplace(key, *made);
  return made;
}

std::weak_ptr<void> DeviceEngine::keep(DeviceMarkRef mark, std::shared_ptr<void> held) {
  const auto kept = std::make_shared<std::shared_ptr<void>>(std::move(held));
  if (mark->captured) {
    kept_for_good_.push_back(kept);
    return kept;
  }
  Line& line = kept_[{mark->device, mark->stream}];
  line.push_back({std::move(mark), kept});
  ++in_line_;
  pause_ = kFirstPause;
  if (timer_ == 0) look_later();
  return kept;
}

void DeviceEngine::abandon() {
  if (timer_ != 0) loop_.cancel_timer(std::exchange(timer_, 0));
  if (pending()) {
    left_ = true;
    memory_.leave_to_process();
    leave_to_process(std::exchange(kept_, {}));
    in_line_ = 0;
  }
  kept_for_good_.clear();
}

void DeviceEngine::look_later() {
  timer_ = loop_.call_at(loop_.now() + pause_, [this] {
    timer_ = 0;
    look();
  });
  pause_ = std::min(2 * pause_, kLongestPause);
}

bool DeviceEngine::front_is_done(Line& line) {
  const DeviceMarkRef mark = line.front().mark;
  if (mark->event == nullptr) {
    const Result<bool> capturing = runtime_.is_capturing(mark->device, mark->stream);
    if (is_closed_by_capture(capturing)) return false;  // later
    Result<DeviceMarkRef> recorded = events_.recorded(mark);
    if (!recorded) {
      log::error("a stream cannot be watched: {}", recorded.status().text());
      kept_for_good_.push_back(line.front().held);  // there is no telling when it is done
      return true;
    }
    // It stands as well for what came on the stream until now.
    for (Kept& kept : line) {
      if (kept.mark->event == nullptr) kept.mark = recorded.value();
    }
  }
  const Result<bool> done = runtime_.query(mark->device, line.front().mark->event);
  if (!done) {
    log::error("a device cannot be watched: {}", done.status().text());
    kept_for_good_.push_back(line.front().held);
  }
  return !done || done.value();
}

std::vector<DeviceMarkRef> DeviceEngine::in_line(int device) {
  look();
  std::vector<DeviceMarkRef> marks;
  for (const auto& [stream, line] : kept_) {
    if (stream.first != device) continue;
    DeviceMarkRef last = line.back().mark;
    if (last->event == nullptr && !is_closed_by_capture(runtime_.is_capturing(device, stream.second))) {
      if (Result<DeviceMarkRef> recorded = events_.recorded(last)) last = std::move(recorded).value();
    }
    if (last->event != nullptr) marks.push_back(std::move(last));
  }
  return marks;
}

void DeviceEngine::look() {
  std::vector<Kept> finished;  // let go of at the end: that may come back here
  for (auto& [stream, line] : kept_) {
    while (!line.empty() && front_is_done(line)) {
      finished.push_back(std::move(line.front()));
      line.pop_front();
    }
  }
  in_line_ -= finished.size();
  std::erase_if(kept_, [](const auto& one) { return one.second.empty(); });
  finished.clear();
  if (watch_) watch_();
  if (pending() && timer_ == 0) look_later();
}

}  // namespace hvd
