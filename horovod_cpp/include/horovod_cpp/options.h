// What a user may set, with its defaults. Read from the environment at init (common/env_options.cc has the names).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace hvd {

/// The settings marked "agreed" choose paths, so all ranks must have them alike; init compares them.
struct Options {
  std::size_t fusion_threshold_bytes = std::size_t{128} << 20;  ///< agreed: cap of one fused call; 0: no fusion
  std::size_t fusion_copy_limit_bytes = std::size_t{64} << 10;  ///< agreed: a larger tensor is never copied to fuse
  std::chrono::microseconds cycle_time{1000};                   ///< longest wait for company, not a sleep
  std::size_t cache_capacity = 65536;                           ///< agreed: names remembered; 0: no response cache
  std::size_t small_limit_bytes = std::size_t{64} << 10;        ///< agreed: up to here, recursive doubling
  std::size_t standing_limit_bytes = std::size_t{1} << 20;      ///< up to here, a repeated call may need no negotiation
  int standing_after = 8;                                       ///< after so many calls alone in a row; 0: never
  std::size_t pull_from_bytes = std::size_t{2} << 20;           ///< agreed: from here, a host copies once; 0: never
  std::size_t segment_bytes = std::size_t{256} << 10;           ///< agreed: piece of a chunk in flight
  std::chrono::microseconds spin_time{50};                      ///< how long a waiter looks before it sleeps
  std::chrono::seconds stall_check_time{60};                    ///< 0: no stall check
  std::chrono::seconds stall_shutdown_time{0};                  ///< 0: never
  std::chrono::seconds start_timeout{30};                       ///< for all ranks to meet at init
  std::chrono::milliseconds shutdown_timeout{2000};             ///< for a farewell to reach all ranks
  int log_level = 3;                                            ///< 0 trace .. 5 fatal
  bool log_hide_time = false;
  bool dynamic_process_sets = false;      ///< agreed
  std::string transport = "auto";         ///< agreed: auto, tcp, shm or mpi for bulk data
  std::string gpu_operations = "nccl";    ///< agreed: what carries device memory: nccl, or host (through host memory)
  std::size_t nccl_registered_bytes = 0;  ///< agreed: of each set, for fused calls; 0: none
  bool hierarchical_allreduce = false;    ///< agreed: of device memory: NCCL within hosts, host transports between
  std::string timeline;                   ///< file of the timeline; empty or DYNAMIC: none from the start
  bool timeline_mark_cycles = false;
  std::string fault;  ///< see common/fault.h
};

}  // namespace hvd
