// Joining and leaving a job, and this process's place in it. Include collectives.h for the operations.
// Any thread. Every function but init, shutdown, is_initialized and version throws PreconditionError before init.
#pragma once

#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/c_api.h>
#include <horovod_cpp/error.h>
#include <horovod_cpp/process_set.h>

namespace hvd {

struct InitOptions {
  /// Static process sets, equal on all ranks: global ranks in any order. They get the ids 1, 2, ... in this order.
  std::vector<std::vector<int>> process_sets{};
  /// In place of the environment's variables of these names: {{"HOROVOD_FUSION_THRESHOLD", "1048576"}}.
  std::vector<std::pair<std::string, std::string>> settings{};
};

/// Joins the ranks of the job; a program that no launcher has started is a job of one rank. Blocks until all have met
/// or HOROVOD_START_TIMEOUT has passed. A second call does nothing. Throws InvalidArgument for bad options or ranks
/// whose settings differ, InternalError for missing ranks, Unavailable for a missing library.
inline void init(const InitOptions& options = {}, std::source_location site = std::source_location::current()) {
  if (hvd_abi_version() < HVD_ABI_VERSION) {
    detail::raise(StatusCode::kUnavailable, "init",
                  std::string("the program needs version ") + std::to_string(HVD_ABI_VERSION) +
                      " of the C ABI; the library that it runs with, horovod_cpp " + hvd_version() + ", has version " +
                      std::to_string(hvd_abi_version()),
                  site);
  }
  std::vector<hvd_rank_list> sets;
  for (const std::vector<int>& ranks : options.process_sets) {
    sets.push_back({ranks.data(), static_cast<std::int32_t>(ranks.size())});
  }
  std::vector<hvd_setting> settings;
  for (const auto& [name, value] : options.settings) settings.push_back({name.c_str(), value.c_str()});
  hvd_init_options given;
  HVD_INIT_STRUCT(&given);
  given.process_set_count = static_cast<std::int32_t>(sets.size());
  given.process_sets = sets.data();
  given.setting_count = static_cast<std::int32_t>(settings.size());
  given.settings = settings.data();
  detail::check(hvd_init(&given), "init", site);
}

/// Ends the job for all ranks: what is in flight anywhere ends with an error. Blocks for about 5 s at most. Does
/// nothing before init; init may be called again afterwards.
inline void shutdown(std::source_location site = std::source_location::current()) {
  detail::check(hvd_shutdown(), "shutdown", site);
}

/// Whether init has been called and the job has not been shut down by this rank.
inline bool is_initialized() { return hvd_is_initialized() == 1; }

/// Of the library: "0.1.0". Needs no init.
inline std::string version() { return hvd_version(); }

namespace detail {
inline hvd_topology topology(const std::source_location& site) {
  hvd_topology topology;
  HVD_INIT_STRUCT(&topology);
  check(hvd_get_topology(&topology), "topology", site);
  return topology;
}
}  // namespace detail

/// Global rank of this process, 0 .. size()-1.
inline int rank(std::source_location site = std::source_location::current()) { return detail::topology(site).rank; }
/// Number of ranks of the job.
inline int size(std::source_location site = std::source_location::current()) { return detail::topology(site).size; }
/// Index of this rank among those of its host.
inline int local_rank(std::source_location site = std::source_location::current()) {
  return detail::topology(site).local_rank;
}
/// Number of ranks on this host.
inline int local_size(std::source_location site = std::source_location::current()) {
  return detail::topology(site).local_size;
}
/// Index of this host among those that have a rank with this local rank.
inline int cross_rank(std::source_location site = std::source_location::current()) {
  return detail::topology(site).cross_rank;
}
/// Number of hosts that have a rank with this local rank.
inline int cross_size(std::source_location site = std::source_location::current()) {
  return detail::topology(site).cross_size;
}
/// Whether every host has as many ranks.
inline bool is_homogeneous(std::source_location site = std::source_location::current()) {
  return detail::topology(site).is_homogeneous == 1;
}

/// Joins in its constructor, shuts down in its destructor; where the job was joined before, both do nothing. Declare it
/// before everything that communicates.
class [[nodiscard]] Session {
 public:
  explicit Session(const InitOptions& options = {}, std::source_location site = std::source_location::current())
      : joined_here_(!is_initialized()) {
    init(options, site);
  }
  ~Session() {
    if (joined_here_) hvd_shutdown();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  bool joined_here_;
};

}  // namespace hvd
