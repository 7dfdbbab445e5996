#include "horovod_cpp/engine/device_source.h"

#include "ops/device/device_loader.h"
#include "ops/nccl/nccl_loader.h"

namespace hvd {
namespace {

class ThisMachine final : public DeviceSource {
 public:
  Result<DeviceRuntime*> runtime() override { return load_device_runtime(); }
  Result<const nccl::Api*> nccl() override {
    Result<const NcclLibrary*> library = load_nccl();
    if (!library) return library.status();
    return &library.value()->api;
  }
};

}  // namespace

DeviceSource& devices_of_this_machine() {
  static ThisMachine machine;
  return machine;
}

}  // namespace hvd
