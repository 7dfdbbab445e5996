#include "ops/transport/members.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string>

namespace hvd {

Result<std::vector<int>> checked_members(const std::vector<int>& members, int rank, int size) {
  if (members.empty()) return members;
  const auto wrong = [&](const std::string& what) {
    return Status::invalid_argument(
        fmt::format("init(comm=[{}]): {}; the list has the ranks of this launch of {} that form the job",
                    fmt::join(members, ", "), what, size));
  };
  std::vector<int> ascending = members;
  std::sort(ascending.begin(), ascending.end());
  for (const int member : ascending) {
    if (member < 0 || member >= size) return wrong(fmt::format("{} is not a rank from 0 to {}", member, size - 1));
  }
  if (const auto twice = std::adjacent_find(ascending.begin(), ascending.end()); twice != ascending.end()) {
    return wrong(fmt::format("rank {} is in it twice", *twice));
  }
  if (!std::binary_search(ascending.begin(), ascending.end(), rank)) {
    return wrong(fmt::format("rank {}, which called it, is not in it", rank));
  }
  const bool everyone = static_cast<int>(members.size()) == size && members == ascending;
  return everyone ? std::vector<int>() : members;
}

}  // namespace hvd
