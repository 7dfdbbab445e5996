#include "ops/hierarchy.h"

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace hvd {
namespace {

/// Of each rank: how many of the set are on its host before it.
std::vector<int> places_on_hosts(const Membership& set) {
  std::map<int, int> seen;
  std::vector<int> places;
  for (const int host : set.hosts) places.push_back(seen[host]++);
  return places;
}

void add(Membership& part, const Membership& set, std::size_t index) {
  part.ranks.push_back(set.ranks[index]);
  part.hosts.push_back(set.hosts[index]);
}

}  // namespace

bool has_hierarchy(const Membership& set) {
  std::map<int, int> ranks_on;
  for (const int host : set.hosts) ++ranks_on[host];
  if (ranks_on.size() < 2) return false;
  const int each = ranks_on.begin()->second;
  return each > 1 && std::all_of(ranks_on.begin(), ranks_on.end(), [&](const auto& one) { return one.second == each; });
}

Hierarchy hierarchy_of(const Membership& set, int rank) {
  auto local = std::make_shared<Membership>();
  auto cross = std::make_shared<Membership>();
  local->generation = cross->generation = set.generation;
  const std::vector<int> places = places_on_hosts(set);
  const auto own = static_cast<std::size_t>(rank);
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (set.hosts[i] == set.hosts[own]) add(*local, set, i);
    if (places[i] == places[own]) add(*cross, set, i);
  }
  return {std::move(local), std::move(cross)};
}

}  // namespace hvd
