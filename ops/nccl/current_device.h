// Makes a device the calling thread's current one for a while: NCCL looks at it. Any thread.
#pragma once

#include "ops/device/device_runtime.h"

namespace hvd {

class CurrentDevice {
 public:
  CurrentDevice(DeviceRuntime& runtime, int device) : runtime_(runtime), former_(runtime.exchange_current(device)) {}
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  // NOLINTNEXTLINE(bugprone-exception-escape): a variant that holds what was just asked for
  ~CurrentDevice() {
    if (former_.ok()) static_cast<void>(runtime_.exchange_current(former_.value()));
  }
  Status status() const { return former_.status(); }

 private:
  DeviceRuntime& runtime_;
  Result<int> former_;
};

}  // namespace hvd
