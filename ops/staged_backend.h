// Carries out one call on device memory by way of host memory: copies in, the host's algorithm, copies out. For what
// NCCL does not do, and where there is no NCCL. Runs under the Turn; it never waits for the device, it looks.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "ops/backend.h"
#include "ops/device/device_engine.h"
#include "ops/device_call_settings.h"
#include "ops/host_backend.h"

namespace hvd {

class StagedBackend final : public Backend {
 public:
  StagedBackend(Loop& loop, DeviceEngine& devices, DeviceCallSettings settings)
      : loop_(loop), devices_(devices), settings_(std::move(settings)) {}

  Task<Status> begin(CollectiveContext& context) override;
  Result<MadeMemory> make_output(std::size_t bytes) override;
  Task<Status> allreduce(CollectiveContext& context, AllreduceCall call) override;
  Task<Status> allgather(CollectiveContext& context, AllgatherCall call) override;
  Task<Status> broadcast(CollectiveContext& context, BroadcastCall call) override;
  Task<Status> reducescatter(CollectiveContext& context, ReducescatterCall call) override;
  Task<Status> alltoall(CollectiveContext& context, AlltoallCall call) override;
  Result<DeviceMarkRef> end(const Status& status, std::shared_ptr<void> held) override;

 private:
  /// Pinned host memory in which the call's bytes at `device_memory` stand; nullptr for nullptr.
  Result<std::byte*> stand_in(const std::byte* device_memory, std::size_t bytes);
  /// The same, with what lies at `device_memory` on its way to it.
  Result<std::byte*> bring(const std::byte* device_memory, std::size_t bytes);
  Status take_back(std::byte* device_memory, const std::byte* from, std::size_t bytes);
  /// Until everything brought is there.
  Task<Status> arrived(CollectiveContext& context);

  Loop& loop_;
  DeviceEngine& devices_;
  DeviceCallSettings settings_;
  HostBackend host_;
  DeviceStream stream_ = nullptr;
  bool has_stream_ = false;
  std::vector<std::shared_ptr<std::byte>> pinned_;
};

}  // namespace hvd
