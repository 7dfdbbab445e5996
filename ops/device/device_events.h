// Events of a device, made once and given out again; and what one of them stands for.
// Any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "common/guarded.h"
#include "ops/device/device_runtime.h"

namespace hvd {

/// All that a stream had been given when this was made. The event goes back to its pool with the last reference.
struct DeviceMark {
  int device = 0;
  /// nullptr: none was recorded, as whoever made this goes on on the same stream. Recorded later, an event stands for
  /// it and for what the stream has been given since.
  DeviceEvent event = nullptr;
  DeviceStream stream = nullptr;
  std::uint64_t number = 0;  ///< a mark of the same stream with a higher number was made later, and stands for more
  bool captured = false;     ///< a part of a graph: it can be waited for within the graph, and cannot be asked
};
using DeviceMarkRef = std::shared_ptr<const DeviceMark>;

/// Adds a mark to those that have to be waited for: of one stream the latest is enough.
inline void add_mark(std::vector<DeviceMarkRef>& marks, const DeviceMarkRef& mark) {
  for (DeviceMarkRef& other : marks) {
    if (other->device != mark->device || other->stream != mark->stream || other->captured != mark->captured) continue;
    if (other->number < mark->number) other = mark;
    return;
  }
  marks.push_back(mark);
}

class DeviceEvents {
 public:
  explicit DeviceEvents(DeviceRuntime& runtime) : idle_(std::make_shared<Idle>(runtime)) {}

  /// A mark without an event.
  static DeviceMarkRef place(int device, DeviceStream stream, bool captured) {
    return std::make_shared<DeviceMark>(DeviceMark{device, nullptr, stream, 0, captured});
  }
  /// The mark itself, or one with an event in its place.
  Result<DeviceMarkRef> recorded(const DeviceMarkRef& mark) {
    if (mark->event != nullptr) return mark;
    return this->mark(mark->device, mark->stream, mark->captured);
  }

  /// Marks what `stream` has been given so far.
  Result<DeviceMarkRef> mark(int device, DeviceStream stream, bool captured = false) {
    Result<DeviceEvent> event = idle_->take(device);
    if (!event) return event.status();
    // The reference first: it gives the event back if it cannot be recorded.
    const DeviceMarkRef mark(new DeviceMark{device, *event, stream, idle_->made.fetch_add(1), captured},
                             [idle = idle_](const DeviceMark* done) {
                               idle->put(done->device, done->event);
                               delete done;
                             });
    HVD_RETURN_IF_ERROR(idle_->runtime.record(device, mark->event, stream));
    return mark;
  }

 private:
  struct Idle {
    explicit Idle(DeviceRuntime& of) : runtime(of) {}
    Idle(const Idle&) = delete;
    Idle& operator=(const Idle&) = delete;
    ~Idle() {
      events.with([this](auto& by_device) {
        for (auto& [device, idle] : by_device) {
          for (DeviceEvent event : idle) runtime.destroy_event(device, event);
        }
      });
    }

    Result<DeviceEvent> take(int device) {
      DeviceEvent found = events.with([device](auto& by_device) -> DeviceEvent {
        std::vector<DeviceEvent>& idle = by_device[device];
        if (idle.empty()) return nullptr;
        DeviceEvent event = idle.back();
        idle.pop_back();
        return event;
      });
      if (found != nullptr) return found;
      return runtime.create_event(device);
    }
    void put(int device, DeviceEvent event) {
      events.with([&](auto& by_device) { by_device[device].push_back(event); });
    }

    DeviceRuntime& runtime;
    std::atomic<std::uint64_t> made{0};
    Guarded<std::map<int, std::vector<DeviceEvent>>> events;
  };

  std::shared_ptr<Idle> idle_;
};

}  // namespace hvd
