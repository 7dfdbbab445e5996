// One call over NCCL: puts packing, the collective and unpacking in line on the engine's stream. It never waits for the
// device. Runs under the Turn.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "ops/nccl/current_device.h"
#include "ops/nccl/nccl_backend.h"

namespace hvd {

class NcclCall : public Backend {
 public:
  NcclCall(NcclBackend& backend, NcclBackend::CommunicatorRef communicator, DeviceCallSettings settings)
      : backend_(backend), communicator_(std::move(communicator)), settings_(std::move(settings)) {}
  NcclCall(const NcclCall&) = delete;
  NcclCall& operator=(const NcclCall&) = delete;

  Task<Status> begin(CollectiveContext& context) override;
  Result<MadeMemory> make_output(std::size_t bytes) override;
  Task<Status> allreduce(CollectiveContext& context, AllreduceCall call) override;
  Task<Status> allgather(CollectiveContext& context, AllgatherCall call) override;
  Task<Status> broadcast(CollectiveContext& context, BroadcastCall call) override;
  Task<Status> reducescatter(CollectiveContext& context, ReducescatterCall call) override;
  Task<Status> alltoall(CollectiveContext& context, AlltoallCall call) override;
  Result<DeviceMarkRef> end(const Status& status, std::shared_ptr<void> held) override;

 protected:
  DeviceRuntime& runtime() { return backend_.devices_.runtime(); }
  DeviceEngine& devices() { return backend_.devices_; }
  const nccl::Api& api() const { return backend_.api(); }
  nccl::Comm comm() const { return communicator_->comm; }
  DeviceStream stream() const { return stream_; }
  const DeviceCallSettings& settings() const { return settings_; }
  /// Makes the communicator, of the ranks of `context`, unless it is there.
  virtual Task<Status> connect(CollectiveContext& context);
  /// The sum, or whatever the call asks for, over all ranks of the set: of each element of `whole`, whose type is what
  /// NCCL reduces. Its input may be its output. An average is not divided yet.
  virtual Task<Status> reduce(CollectiveContext& context, const AllreduceCall& call, AllreduceTensor whole);
  /// Whether `reduce` can take the set's registered memory.
  virtual bool uses_registered() const { return true; }
  Status copy(std::byte* to, const std::byte* from, std::size_t bytes);
  Status checked(nccl::Result result, std::string_view what) { return backend_.checked(result, comm(), what); }
  /// Gives NCCL what `body` issues as one group.
  template <typename Body>
  Status in_group(std::string_view what, Body body);
  Task<Status> settle(CollectiveContext& context, std::string_view what) {
    return backend_.settle(context, *communicator_, settings_, what);
  }
  Task<Status> reach(CollectiveContext& context, DeviceMarkRef mark) {
    return backend_.reach(context, *communicator_, settings_, std::move(mark));
  }

 private:
  bool has_company() const { return communicator_->comm != nullptr && backend_.has_several(); }
  Status follow_other_communicators();
  Result<DeviceMarkRef> mark_end();
  Result<std::shared_ptr<DeviceBlock>> lease(std::size_t bytes);
  Result<std::byte*> scratch(std::size_t bytes);
  /// The set's registered memory, in the order of those who had it before.
  Result<std::byte*> enter_registered();
  Status leave_registered();
  Status convert(const DeviceConversion& conversion, std::span<const DevicePiece> pieces);
  /// data / divisor * factor, in place.
  Status scale(std::byte* data, DataType dtype, std::size_t count, int divisor, double factor);
  /// Multiplies into memory of the call's own, from which the pieces then come.
  Status scale_apart(DataType dtype, double factor, std::vector<DevicePiece>& pieces);
  Status all_reduce_in_line(const std::byte* input, std::byte* output, std::size_t count, DataType dtype, ReduceOp op);
  Status allreduce_alone(const AllreduceCall& call);
  Task<Status> allreduce_one(CollectiveContext& context, const AllreduceCall& call);
  Task<Status> allreduce_packed(CollectiveContext& context, const AllreduceCall& call);

  NcclBackend& backend_;
  NcclBackend::CommunicatorRef communicator_;
  DeviceCallSettings settings_;
  DeviceStream stream_ = nullptr;
  bool in_turn_ = false;     // nobody else may put work in line
  bool has_stream_ = false;  // from here on there may be work of this call in line
  std::vector<std::shared_ptr<DeviceBlock>> scratch_;
};

template <typename Body>
Status NcclCall::in_group(std::string_view what, Body body) {
  HVD_RETURN_IF_ERROR(communicator_->failed);  // while the call waited for something else
  const CurrentDevice current(runtime(), settings_.device);
  HVD_RETURN_IF_ERROR(current.status());
  HVD_RETURN_IF_ERROR(checked(api().group_start(), what));
  const Status issued = body();
  const Status ended = checked(api().group_end(), what);  // also when something in it failed
  return issued.ok() ? ended : issued;
}

}  // namespace hvd
