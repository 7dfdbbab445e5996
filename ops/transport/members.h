// The ranks of a launch that form a job of their own, as a caller of init lists them.
// Values; any thread.
#pragma once

#include <vector>

#include <horovod_cpp/status.h>

namespace hvd {

/// `members` as they are, or nothing where they are all ranks in their order. kInvalidArgument, with the list and what
/// is wrong, unless they are different ranks of a launch of `size` ranks and `rank` is one of them, or nothing: all.
Result<std::vector<int>> checked_members(const std::vector<int>& members, int rank, int size);

}  // namespace hvd
