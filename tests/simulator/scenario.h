// What one seed stands for: the job, its program, the network and what goes wrong. Values; drawn once, then read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <horovod_cpp/options.h>

#include "horovod_cpp/engine/request_response.h"
#include "tests/simulator/simulated_network.h"

namespace hvd::simulator {

/// A process set of the program. Slot 0 has all ranks; others are static, or added and perhaps removed on the way.
struct SetPlan {
  std::vector<int> ranks;
  bool added_on_the_way = false;
  bool contains(int rank) const { return std::find(ranks.begin(), ranks.end(), rank) != ranks.end(); }
};

/// One operation that the members of a set enqueue, each in its own order within the batch.
struct OperationPlan {
  enum class Odd : std::uint8_t { kNothing, kDataType, kShape, kReduceOp, kPrescale, kRoot, kRanks };

  OpKind op = OpKind::kAllreduce;
  std::string name;
  bool unnamed = false;  ///< enqueued without a name; `name` is what the engine will give it
  int slot = 0;
  int batch = 0;
  DataType dtype = DataType::kFloat32;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
  Shape shape;
  std::vector<Shape> more;                        ///< a group: the tensors after the first, of the same type
  std::vector<std::int64_t> rows;                 ///< allgather and alltoall: first dimension by rank in the set
  std::vector<std::vector<std::int64_t>> splits;  ///< alltoall: by rank in the set, rows for each rank in the set
  int root = 0;                                   ///< broadcast: global rank
  bool in_place = false;
  bool is_gradient = false;  ///< one of many that may be fused
  bool inexact = false;      ///< values whose sum rounds: compared with a tolerance, and bit for bit between ranks
  std::uint64_t layout = 0;  ///< not 0: decides in which order dimensions lie in memory; 0: C order, as all others have
  bool layouts_differ = false;  ///< members with even numbers, and those with odd ones, have another order each
  int subject = 0;              ///< slot that is added or removed
  Odd odd = Odd::kNothing;
  int odd_rank = -1;     ///< the one that differs
  int twice_rank = -1;   ///< enqueues it a second time at once, and must be refused
  int absent_rank = -1;  ///< never enqueues it

  bool is_mismatch() const { return odd != Odd::kNothing; }
  /// Shapes of all its tensors, as `rank_index` of the set brings them.
  std::vector<Shape> shapes(int rank_index) const;
};

/// Something that happens once, when so many operations have been enqueued in all, and a little later.
struct Incident {
  int rank = -1;
  int after_enqueued = 0;
  Duration delay{};
};

struct TransferFault {
  int rank = -1;
  bool sends = false;
  int passage = 0;  ///< counted from 1
};

struct Scenario {
  std::uint64_t seed = 0;
  int ranks = 2;
  Options options;
  NetworkBehaviour network;
  Duration longest_think{};     ///< between two operations of one rank
  int think_percent = 0;        ///< how often a rank thinks at all
  Duration longest_dispatch{};  ///< until a rank that is woken runs
  int steps_at_a_time = 0;      ///< a rank that runs pauses after so many steps; 0: never
  bool waits_after_batch = false;
  bool joins_at_once = false;     ///< a rank joins while its last operations may be under way
  bool careless_removal = false;  ///< sets are removed while their operations may be under way
  std::vector<SetPlan> sets;
  std::vector<OperationPlan> operations;
  std::vector<std::vector<int>> order;  ///< by rank: indices of `operations`
  std::vector<int> last_batch;          ///< by rank: from then on it has no data, and joins; empty: nobody joins
  std::optional<Incident> death;
  std::optional<Incident> shutdown;
  std::optional<TransferFault> fault;
  std::optional<Incident>
      hang;  ///< the rank stops for good, though its connections stay; then `shutdown->rank` gives up
  bool has_absent_rank = false;
  Sabotage sabotage;  ///< never drawn; tests set it

  /// Whether a member of the operation's set enqueues it, or has joined by then.
  bool takes_part(const OperationPlan& plan, int rank) const {
    return plan.op == OpKind::kJoin || last_batch.empty() || plan.batch <= last_batch[static_cast<std::size_t>(rank)];
  }
  /// The members of its set that enqueue the operation.
  std::vector<int> present(const OperationPlan& plan) const;

  bool is_undisturbed() const { return !death && !shutdown && !fault && !hang && !has_absent_rank; }
};

struct ScenarioLimits {
  int fewest_ranks = 2;
  int most_ranks = 8;
  bool control_only = false;  ///< no data beyond a few elements
};

/// The same seed and limits give the same scenario.
Scenario draw_scenario(std::uint64_t seed, const ScenarioLimits& limits);

/// One line for a report.
std::string summary(const Scenario& scenario);

}  // namespace hvd::simulator
