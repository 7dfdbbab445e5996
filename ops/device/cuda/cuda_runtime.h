// DeviceRuntime over the CUDA runtime API. Any thread; device_runtime.h says what each function promises.
#pragma once

#include <string>

#include "ops/device/cuda/device_scope.h"
#include "ops/device/device_runtime.h"

namespace hvd::cuda {

class CudaRuntime final : public DeviceRuntime {
 public:
  CudaRuntime(const DriverCalls& driver, int devices, std::string description);

  std::string description() const override { return description_; }
  int device_count() const override { return contexts_.devices(); }
  Result<int> exchange_current(int device) override;

  Result<DeviceStream> create_stream(int device) override;
  void destroy_stream(int device, DeviceStream stream) override;
  Result<bool> is_capturing(int device, DeviceStream stream) override;

  Result<DeviceEvent> create_event(int device) override;
  void destroy_event(int device, DeviceEvent event) override;
  Status record(int device, DeviceEvent event, DeviceStream stream) override;
  Status wait(int device, DeviceStream stream, DeviceEvent event) override;
  Result<bool> query(int device, DeviceEvent event) override;

  Result<void*> allocate(int device, std::size_t bytes) override;
  void free(int device, void* memory) override;
  Result<void*> allocate_pinned(std::size_t bytes) override;
  void free_pinned(void* memory) override;
  Result<int> device_of(const void* memory) override;

  Status copy(int device, void* to, const void* from, std::size_t bytes, DeviceStream stream) override;
  Status convert(int device, const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                 DeviceStream stream) override;

 private:
  const std::string description_;
  Contexts contexts_;
};

}  // namespace hvd::cuda
