// Memory of devices that the engine owns: allocated once, given out again in the order of streams, so that nobody waits
// for a device. Also pinned host memory.
// Any thread; blocks may outlive the pool.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "common/guarded.h"
#include "ops/device/device_events.h"

namespace hvd {

/// A stretch of device memory in use.
struct DeviceBlock {
  std::byte* memory = nullptr;
  std::size_t bytes = 0;
  int device = 0;
  std::vector<DeviceMarkRef> last_uses;  ///< of whoever had it before: the next user's stream waits for them
  std::vector<DeviceStream> consumers;   ///< streams outside the engine that have been let wait for what it holds

  void add_consumer(DeviceStream stream) {
    if (std::find(consumers.begin(), consumers.end(), stream) == consumers.end()) consumers.push_back(stream);
  }
};

class DeviceMemory {
 public:
  explicit DeviceMemory(DeviceRuntime& runtime) : shelves_(std::make_shared<Shelves>(runtime)) {}
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  /// What is idle is given back to the device; what is in use, once it is not.
  ~DeviceMemory();

  /// A device may be at work on what was handed out, for ever: nothing is given back to it any more, as that would
  /// wait.
  void leave_to_process();

  /// At least `bytes`, to be used in the order of `stream`. Released with the last reference: by then the engine's own
  /// streams have to be done with it, or be `stream`.
  Result<std::shared_ptr<DeviceBlock>> lease(int device, std::size_t bytes, DeviceStream stream);
  /// Memory that was never used: what becomes part of a graph must not depend on what came before.
  Result<std::shared_ptr<DeviceBlock>> lease_fresh(int device, std::size_t bytes);
  /// Memory that somebody else has made, as a block: `free` lets it go with the last reference, on any thread, unless a
  /// device may be at work on it for ever.
  std::shared_ptr<DeviceBlock> adopt(int device, void* memory, std::size_t bytes, std::function<void(void*)> free);
  /// Host memory that a device copies from and to; not in the order of a stream: it is idle when it is released.
  Result<std::shared_ptr<std::byte>> lease_pinned(std::size_t bytes);

 private:
  struct Idle {
    std::multimap<std::pair<int, std::size_t>, DeviceBlock> blocks;  // by device and size
    std::multimap<std::size_t, std::byte*> pinned;                   // by size
    std::vector<DeviceBlock> parked;  // whose consumers are being captured: no event can tell of them now
    bool closed = false;
    bool left = false;
  };
  struct Shelves {
    explicit Shelves(DeviceRuntime& of) : runtime(of) {}
    DeviceRuntime& runtime;
    Guarded<Idle> idle;
  };

  static std::shared_ptr<DeviceBlock> hand_out(const std::shared_ptr<Shelves>& shelves, DeviceBlock block);
  static void take_back(Shelves& shelves, DeviceBlock block);
  static void give_to_device(Shelves& shelves);
  /// Marks what the consumers have been given. False while one of them is being captured.
  static Result<bool> mark_consumers(Shelves& shelves, DeviceBlock& block);
  static void look_at_parked(Shelves& shelves);

  std::shared_ptr<Shelves> shelves_;
};

}  // namespace hvd
