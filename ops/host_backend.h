// Carries out agreed calls on host memory: packs, picks the algorithm, scales, unpacks.
// Joins algorithms, transports and reduction. Runs under the Turn.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/algorithms/algorithm_table.h"
#include "ops/backend.h"
#include "ops/host_buffers.h"

namespace hvd {

/// The bytes that the call needs in `fusion`; 0 for a single tensor.
std::size_t fusion_bytes(const AllreduceCall& call);

/// `fusion`: that many bytes. The output of a single tensor is wanted.
Task<Status> host_allreduce(CollectiveContext& context, AllreduceCall call, std::span<std::byte> fusion);

/// What ranks may have sent for a standing allreduce that this rank will not begin: nobody will ask for it.
void discard_standing_allreduce(CollectiveContext& context, const AllreduceCall& call);

/// `bytes_by_rank`: the block of each rank of the set; `output` holds them one behind the other.
Task<Status> host_allgather(CollectiveContext& context, const std::byte* input, std::byte* output,
                            std::vector<std::size_t> bytes_by_rank);

/// `root` is a rank in the set. On the root, `input` is copied to `output` unless they are one.
Task<Status> host_broadcast(CollectiveContext& context, const std::byte* input, std::byte* output, std::size_t bytes,
                            int root);

Task<Status> host_reducescatter(CollectiveContext& context, ReducescatterCall call);

/// Block i of `input` goes to rank i of the set, block i of `output` comes from it; sizes in bytes.
Task<Status> host_alltoall(CollectiveContext& context, const std::byte* input, std::byte* output,
                           std::vector<std::size_t> bytes_to, std::vector<std::size_t> bytes_from);

/// Tells each rank of the set one number; `told[i]` is the one of rank i, `to[i]` the one for it.
Task<Status> host_exchange_counts(CollectiveContext& context, std::vector<std::int64_t> to,
                                  std::vector<std::int64_t>& told);

Task<Status> host_barrier(CollectiveContext& context);

/// The functions above as a backend. It has no state of its own: one serves all calls.
class HostBackend final : public Backend {
 public:
  Task<Status> begin(CollectiveContext& context) override;
  Result<MadeMemory> make_output(std::size_t bytes) override;
  Task<Status> allreduce(CollectiveContext& context, AllreduceCall call) override;
  Task<Status> allgather(CollectiveContext& context, AllgatherCall call) override;
  Task<Status> broadcast(CollectiveContext& context, BroadcastCall call) override;
  Task<Status> reducescatter(CollectiveContext& context, ReducescatterCall call) override;
  Task<Status> alltoall(CollectiveContext& context, AlltoallCall call) override;
  Result<DeviceMarkRef> end(const Status& status, std::shared_ptr<void> held) override;
};

}  // namespace hvd
