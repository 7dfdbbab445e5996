// Process sets: some of the ranks, which do operations among themselves. Any thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <source_location>
#include <span>
#include <vector>

#include <horovod_cpp/error.h>

namespace hvd {

/// Names a process set; a plain value. The default one is set 0, all ranks of the job.
class ProcessSet {
 public:
  constexpr ProcessSet() = default;
  /// The set of that number: static sets of init have 1, 2, ... in their order.
  constexpr explicit ProcessSet(int id) : id_(id) {}

  constexpr int id() const { return id_; }

  /// Global ranks in ascending order. Throws InvalidArgument for a set that does not exist.
  std::vector<int> ranks(std::source_location site = std::source_location::current()) const {
    std::int32_t count = 0;
    detail::check(hvd_process_set_ranks(id_, nullptr, 0, &count), "process set", site);
    std::vector<int> ranks(static_cast<std::size_t>(count));
    detail::check(hvd_process_set_ranks(id_, ranks.data(), count, &count), "process set", site);
    return ranks;
  }
  int size(std::source_location site = std::source_location::current()) const {
    std::int32_t count = 0;
    detail::check(hvd_process_set_ranks(id_, nullptr, 0, &count), "process set", site);
    return count;
  }
  /// Place of this rank in the set, 0 .. size()-1; -1 if it is not a member.
  int rank(std::source_location site = std::source_location::current()) const {
    const std::vector<int> members = ranks(site);
    const auto place = std::find(members.begin(), members.end(), detail::rank_or_none());
    return place == members.end() ? -1 : static_cast<int>(place - members.begin());
  }
  bool included(std::source_location site = std::source_location::current()) const { return rank(site) >= 0; }

  friend constexpr bool operator==(ProcessSet, ProcessSet) = default;

 private:
  int id_ = 0;
};

/// Makes a process set of these global ranks, in any order. Every rank of the job calls with the same ranks; blocks
/// until all have. Throws PreconditionError unless HOROVOD_DYNAMIC_PROCESS_SETS=1, InvalidArgument for a set that
/// exists.
inline ProcessSet add_process_set(std::span<const int> ranks,
                                  std::source_location site = std::source_location::current()) {
  const hvd_rank_list list{ranks.data(), static_cast<std::int32_t>(ranks.size())};
  std::int32_t id = 0;
  detail::check(hvd_process_set_add(&list, &id), "add_process_set", site);
  return ProcessSet(id);
}

/// Removes it. Every rank of the job calls; blocks until all have. The set must not be in use; set 0 stays.
inline void remove_process_set(ProcessSet set, std::source_location site = std::source_location::current()) {
  detail::check(hvd_process_set_remove(set.id()), "remove_process_set", site);
}

/// All sets, set 0 first.
inline std::vector<ProcessSet> process_sets(std::source_location site = std::source_location::current()) {
  std::int32_t count = 0;
  detail::check(hvd_process_set_ids(nullptr, 0, &count), "process_sets", site);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  detail::check(hvd_process_set_ids(ids.data(), count, &count), "process_sets", site);
  ids.resize(std::min(ids.size(), static_cast<std::size_t>(count)));  // one may have been removed meanwhile
  return {ids.begin(), ids.end()};
}

}  // namespace hvd
