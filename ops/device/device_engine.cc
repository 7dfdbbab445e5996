#include "ops/device/device_engine.h"

#include <algorithm>
#include <utility>

#include "common/log.h"

namespace hvd {
namespace {

// Nobody waits for what is learnt there: memory comes back a little later, and a failure is told a little later.
constexpr Duration kFirstPause = std::chrono::microseconds(100);
constexpr Duration kLongestPause = std::chrono::milliseconds(2);

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

void DeviceEngine::keep(DeviceMarkRef mark, std::shared_ptr<void> held) {
  if (mark->captured) {
    kept_by_graphs_.push_back(std::move(held));
    return;
  }
  kept_.push_back({std::move(mark), std::move(held)});
  pause_ = kFirstPause;
  if (timer_ == 0) look_later();
}

void DeviceEngine::abandon() {
  if (timer_ != 0) loop_.cancel_timer(std::exchange(timer_, 0));
  if (!kept_.empty()) {
    left_ = true;
    memory_.leave_to_process();
  }
  kept_.clear();
  kept_by_graphs_.clear();
}

void DeviceEngine::look_later() {
  timer_ = loop_.call_at(loop_.now() + pause_, [this] {
    timer_ = 0;
    look();
  });
  pause_ = std::min(2 * pause_, kLongestPause);
}

void DeviceEngine::look() {
  // A device does its work in order, so one look at the oldest tells of all that is not done behind it.
  while (!kept_.empty()) {
    const Result<bool> done = runtime_.query(kept_.front().mark->device, kept_.front().mark->event);
    if (done && !done.value()) break;
    if (!done) log::error("a device failed: {}", done.status().text());  // and does nothing more with the memory
    const Kept finished = std::move(kept_.front());
    kept_.pop_front();
  }
  if (watch_) watch_();
  if (!kept_.empty() && timer_ == 0) look_later();
}

}  // namespace hvd
