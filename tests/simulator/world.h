// One simulated job: the product's runtimes over a simulated network, the program that its ranks run, and what goes
// wrong on the way. Everything happens on one thread, in virtual time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "horovod_cpp/engine/runtime.h"
#include "tests/simulator/ends.h"
#include "tests/simulator/response_streams.h"
#include "tests/simulator/scenario.h"

namespace hvd::simulator {

struct Counts {
  std::int64_t operations = 0;  ///< handles that were resolved
  std::int64_t calls = 0;       ///< agreed calls that workers were told of
  std::int64_t fused_calls = 0;
  std::int64_t cache_hits = 0;
  std::int64_t evictions = 0;
  std::int64_t standing_calls = 0;   ///< begun without asking
  std::int64_t withdrawn_calls = 0;  ///< of these, not begun by all ranks
  std::int64_t bytes_reordered = 0;  ///< of tensors that ranks laid out differently in memory
  std::int64_t errors = 0;
  std::int64_t deaths = 0;
  std::int64_t shutdowns = 0;
  std::int64_t faults = 0;
  std::int64_t events = 0;
};

struct Report {
  std::string invariant;  ///< empty: all held
  std::string text;
  std::string trace;  ///< the last lines
  std::uint64_t trace_hash = 0;
  Counts counts;
  std::vector<std::vector<std::byte>> rounded_sums;  // see Ends

  bool ok() const { return invariant.empty(); }
};

class World {
 public:
  World(const Scenario& scenario, bool print_trace);
  ~World();

  /// Runs to the end, or to the first broken invariant.
  Report run();

 private:
  // The memory of one operation of one rank. The engine keeps it alive as long as it needs it.
  struct Buffers {
    std::vector<std::byte> input;
    std::vector<std::byte> output;  // empty where the result goes to `input` or to engine memory
  };
  struct Operation {  // of one rank
    HandleRef handle;
    HandleRef refused;  // of a second enqueue
    std::shared_ptr<Buffers> buffers;
    bool resolved = false;
    bool ended_in_enqueue = false;
    std::uint64_t final_hash = 0;  // of the memory when the handle was resolved
    const void* final_status = nullptr;
  };
  struct Rank {
    std::unique_ptr<FaultHook> fault;
    std::unique_ptr<Runtime> runtime;
    std::vector<Operation> operations;                            // by place in the rank's order
    std::vector<std::size_t> open;                                // places that are enqueued and not resolved
    std::map<std::pair<int, std::string>, std::size_t> last_use;  // place of the last operation of (op and slot, name)
    std::vector<ProcessSetId> set_ids;                            // by slot; kNoSet while unknown
    std::size_t next = 0;                                         // place of the next operation to enqueue
    bool thinking = false;
    bool stopped_program = false;
    bool dead = false;           // or hangs: it does nothing any more
    TimePoint wake_at = kNever;  // the one wake-up that counts
  };

  Rank& rank_of(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  const OperationPlan& plan_at(int rank, std::size_t place) const;
  int index_at(int rank, std::size_t place) const { return scenario_.order[static_cast<std::size_t>(rank)][place]; }

  void build_rank(int rank);
  // ---- the thread of each rank
  void wake(int rank, TimePoint when);
  void run_rank(int rank);
  void collect_resolved(int rank);
  // ---- the program of each rank
  void continue_program(int rank);
  bool must_wait(int rank, const OperationPlan& plan);
  bool enqueue_next(int rank);
  void enqueue_twice(int rank, Operation& operation, const TensorEntry& entry);
  TensorEntry make_entry(int rank, const OperationPlan& plan, int index, Operation& operation);
  void note_enqueued();
  void stop_program(int rank);
  // ---- what goes wrong
  void plan_incident(const Incident& incident, void (World::*what)(int), int rank);
  void die(int rank);
  void hang(int rank);
  void shut_down(int rank);
  // ---- phases
  bool run_events();
  void check_nobody_waits();
  void check_idle_silence();
  void end_job();
  void check_the_books();
  void check_calls_carried_out();
  std::string state_of(int rank);
  std::string states();

  const Scenario& scenario_;
  VirtualClock clock_;
  Trace trace_;
  Checker checker_;
  Schedule schedule_;
  Random random_;
  SimulatedNetwork network_;
  ResponseStreams streams_;
  Ends ends_;
  std::vector<Rank> ranks_;
  int enqueued_ = 0;
  TimePoint last_finish_{};
  std::vector<std::pair<int, std::function<void()>>> waiting_incidents_;  // (operations enqueued, what)
  std::int64_t faults_injected_ = 0;
  Counts counts_;
};

/// Runs a scenario; where sums round and nothing goes wrong, a second time with nothing fused: the bits must be the
/// same.
Report simulate(const Scenario& scenario, bool print_trace);

}  // namespace hvd::simulator
