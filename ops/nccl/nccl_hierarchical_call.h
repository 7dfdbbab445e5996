// A call whose sums are made within each host by NCCL and between hosts by the host's transports: for networks that
// NCCL cannot use well. With L ranks on each of H hosts, each rank gets the sums of its host for a share, one L-th of
// the elements; reduces the share with the ranks of the other hosts that have the same one; and gets the other shares
// from its host. A rank sends (L-1)/L of the bytes twice within its host, and 2(H-1)/H of its share between hosts. The
// share goes through host memory in portions, so that copies and network overlap. It keeps its place in the order of
// launches until the end: ranks may not put the parts of several calls in line in different orders.
// Runs under the Turn; it never waits for the device, it looks.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "ops/hierarchy.h"
#include "ops/nccl/nccl_call.h"
#include "ops/nccl/nccl_reduction.h"

namespace hvd {

/// How the elements of a call fall to the ranks of a host: equal shares one behind the other, and a tail that is too
/// short for one each. The last rank has it behind its share.
struct HostShares {
  HostShares(std::size_t count, int local_size)
      : ranks(static_cast<std::size_t>(local_size)), each(count / ranks), tail(count % ranks) {}
  std::size_t begin(int local_rank) const { return static_cast<std::size_t>(local_rank) * each; }
  std::size_t tail_begin() const { return ranks * each; }
  int tail_rank() const { return static_cast<int>(ranks) - 1; }
  std::size_t count(int local_rank) const { return each + (local_rank == tail_rank() ? tail : 0); }

  std::size_t ranks;
  std::size_t each;
  std::size_t tail;
};

class NcclHierarchicalCall final : public NcclCall {
 public:
  using NcclCall::NcclCall;

 protected:
  Task<Status> connect(CollectiveContext& context) override;
  Task<Status> reduce(CollectiveContext& context, const AllreduceCall& call, AllreduceTensor whole) override;
  /// Its block would have to be used at one offset by all ranks, and each receives its own share.
  bool uses_registered() const override { return false; }

 private:
  /// What is reduced, as NCCL sees it.
  struct Elements {
    AllreduceTensor whole;
    NcclReduction reduction;
    std::size_t bytes;  // of one
  };
  /// Host memory that portions go through in turns: while one is on the network, another comes from the device.
  static constexpr std::size_t kSlots = 2;

  Status scatter_in_line(const Elements& elements, const HostShares& shares);
  Status gather_in_line(const Elements& elements, const HostShares& shares);
  Task<Status> reduce_between_hosts(CollectiveContext& context, const AllreduceCall& call, std::span<std::byte> share,
                                    DataType dtype);
  /// Makes the slots that large.
  Status reserve(CollectiveContext& context, std::size_t bytes);
  /// Puts a copy to a slot in line, and marks its end.
  Result<DeviceMarkRef> fetch(std::span<const std::byte> portion, std::size_t slot);

  std::optional<Hierarchy> hierarchy_;
  int local_rank_ = 0;
  std::array<std::byte*, kSlots> slots_{};
  std::size_t slot_bytes_ = 0;
  std::vector<std::shared_ptr<std::byte>> pinned_;  // the slots, and smaller ones of before
};

}  // namespace hvd
