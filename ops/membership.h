// Who takes part: a value carried by each call, never cached. Growing or shrinking makes a new value.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace hvd {

/// The members of one process set within one generation of the job.
struct Membership {
  std::uint32_t generation = 0;
  std::vector<int> ranks;  ///< global ranks, ascending; a rank's index here is its rank in the set
  std::vector<int> hosts;  ///< host number of each, parallel to `ranks`

  int size() const { return static_cast<int>(ranks.size()); }
  /// The coordinator of a set: its first rank.
  int first() const { return ranks.front(); }
  std::optional<int> index_of(int global_rank) const {
    const auto found = std::lower_bound(ranks.begin(), ranks.end(), global_rank);
    if (found == ranks.end() || *found != global_rank) return std::nullopt;
    return static_cast<int>(found - ranks.begin());
  }
  bool on_one_host() const {
    return std::all_of(hosts.begin(), hosts.end(), [&](int host) { return host == hosts.front(); });
  }
  bool contains(int global_rank) const { return index_of(global_rank).has_value(); }
};

using MembershipRef = std::shared_ptr<const Membership>;

}  // namespace hvd
