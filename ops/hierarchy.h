// How a process set lies on hosts, for collectives that go within each host and then between hosts.
// Pure functions of values; any thread.
#pragma once

#include "ops/membership.h"

namespace hvd {

/// As one rank of a set sees it.
struct Hierarchy {
  MembershipRef local;  ///< the set's ranks on its host
  MembershipRef cross;  ///< of each host the rank that has the same place among those of its host
};

/// Whether there are several hosts, and on each the same number of the set's ranks, more than one. Otherwise nothing is
/// won, or the ranks that meet between hosts would not have the same share. All ranks of the set find the same.
bool has_hierarchy(const Membership& set);

/// Of a set that has one; `rank` is a rank in the set.
Hierarchy hierarchy_of(const Membership& set, int rank);

}  // namespace hvd
