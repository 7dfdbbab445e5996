// Where an engine finds accelerators and NCCL: the modules and libraries of this machine, or those of a test.
// Any thread.
#pragma once

#include <horovod_cpp/status.h>

#include "ops/device/device_runtime.h"
#include "ops/nccl/nccl_api.h"

namespace hvd {

class DeviceSource {
 public:
  virtual ~DeviceSource() = default;
  /// What is returned lives as long as the process; kUnavailable says why there is none. Blocks while it is loaded.
  virtual Result<DeviceRuntime*> runtime() = 0;
  virtual Result<const nccl::Api*> nccl() = 0;
};

/// Loads each at its first use.
DeviceSource& devices_of_this_machine();

}  // namespace hvd
