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

std::weak_ptr<void> DeviceEngine::keep(DeviceMarkRef mark, std::shared_ptr<void> held) {
  const auto kept = std::make_shared<std::shared_ptr<void>>(std::move(held));
  if (mark->captured) {
    kept_for_good_.push_back(kept);
    return kept;
  }
  kept_.push_back({std::move(mark), kept});
  pause_ = kFirstPause;
  if (timer_ == 0) look_later();
  return kept;
}

void DeviceEngine::abandon() {
  if (timer_ != 0) loop_.cancel_timer(std::exchange(timer_, 0));
  if (!kept_.empty()) {
    left_ = true;
    memory_.leave_to_process();
  }
  kept_.clear();
  kept_for_good_.clear();
}

void DeviceEngine::look_later() {
  timer_ = loop_.call_at(loop_.now() + pause_, [this] {
    timer_ = 0;
    look();
  });
  pause_ = std::min(2 * pause_, kLongestPause);
}

bool DeviceEngine::front_is_done() {
  const DeviceMarkRef mark = kept_.front().mark;
  if (mark->event == nullptr) {
    const Result<bool> capturing = runtime_.is_capturing(mark->device, mark->stream);
    if (capturing && capturing.value()) return false;  // an event would become part of a graph; later
    Result<DeviceMarkRef> recorded = events_.recorded(mark);
    if (!recorded) {
      log::error("a stream cannot be watched: {}", recorded.status().text());
      kept_for_good_.push_back(kept_.front().held);  // there is no telling when it is done
      return true;
    }
    // It stands as well for what came on the same stream until now.
    for (Kept& kept : kept_) {
      if (kept.mark->event == nullptr && kept.mark->device == mark->device && kept.mark->stream == mark->stream) {
        kept.mark = recorded.value();
      }
    }
  }
  const Result<bool> done = runtime_.query(mark->device, kept_.front().mark->event);
  if (!done) {
    log::error("a device cannot be watched: {}", done.status().text());
    kept_for_good_.push_back(kept_.front().held);
  }
  return !done || done.value();
}

void DeviceEngine::look() {
  // Not each is looked at: what comes later is rarely done earlier, and nobody waits for it here.
  while (!kept_.empty() && front_is_done()) {
    const Kept finished = std::move(kept_.front());
    kept_.pop_front();
  }
  if (watch_) watch_();
  if (!kept_.empty() && timer_ == 0) look_later();
}

}  // namespace hvd
