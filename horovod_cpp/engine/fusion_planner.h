// Which agreed operations become one call: a pure function of the agreed list and of limits that all ranks share.
// Any thread.
#pragma once

#include <cstddef>
#include <vector>

#include "horovod_cpp/engine/request_response.h"

namespace hvd {

struct FusionLimits {
  std::size_t threshold_bytes = 0;    ///< of one fused call; 0: no fusion
  std::size_t copy_limit_bytes = 0;   ///< a larger tensor travels alone: copying it costs more than a call
  std::size_t small_limit_bytes = 0;  ///< where the algorithm changes: both sides of it never share a call
};

/// `agreed` has one entry each, in the agreed order. Looks ahead past what does not fit, so mixed types still fuse;
/// calls come in the order of their first entry, entries in the agreed order.
std::vector<Response> plan_fusion(std::vector<Response> agreed, const FusionLimits& limits);

/// What counts of a tensor of a group.
struct GroupMember {
  DataType dtype = DataType::kUint8;
  std::size_t bytes = 0;
};

/// Which tensors of a group, all of one call, go through one run of the algorithm: lists of their numbers.
std::vector<std::vector<std::size_t>> plan_group(const std::vector<GroupMember>& members, const FusionLimits& limits);

/// Payload of one entry of an allreduce, per rank.
std::size_t entry_bytes(const Response& response, const ResponseEntry& entry);

/// Whether it could share a call with others.
bool may_fuse(const Response& response, const FusionLimits& limits);

}  // namespace hvd
