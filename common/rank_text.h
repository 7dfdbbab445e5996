// Ranks as people write them: "rank 3", "ranks 0-2,4-7". Pure; any thread.
#pragma once

#include <fmt/format.h>

#include <span>
#include <string>

namespace hvd {

/// `ranks` ascending.
inline std::string rank_text(std::span<const int> ranks) {
  if (ranks.size() == 1) return fmt::format("rank {}", ranks[0]);
  std::string text = "ranks ";
  for (std::size_t i = 0; i < ranks.size();) {
    std::size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    if (i > 0) text += ',';
    text += i == last ? fmt::format("{}", ranks[i]) : fmt::format("{}-{}", ranks[i], ranks[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace hvd
