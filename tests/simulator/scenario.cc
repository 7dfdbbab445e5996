#include "tests/simulator/scenario.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

#include "tests/simulator/random.h"

namespace hvd::simulator {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int kManyRanks = 16;  // from here on, an operation must stay cheap on each rank

NetworkBehaviour draw_network(Random& random, int ranks) {
  NetworkBehaviour network;
  network.shortest = random.pick<Duration>({Duration(0), microseconds(1), microseconds(20)});
  network.longest = network.shortest + random.pick<Duration>({Duration(200), microseconds(5), microseconds(200)});
  if (random.chance(40)) {
    network.straggler_percent = random.pick({1, 10, 40});
    network.straggler_longest = network.longest + random.pick<Duration>({microseconds(50), milliseconds(3)});
  }
  network.eager_limit_bytes = random.pick<std::size_t>({0, 256, 4096, 1 << 20});
  network.copied_limit_bytes = std::min(network.eager_limit_bytes, random.pick<std::size_t>({0, 64, 1024}));
  network.slot_bytes = random.pick<std::size_t>({0, 256, 4096, 4096});
  if (ranks >= kManyRanks) network.slot_bytes = 0;
  network.cut_percent = random.pick({0, 20, 60});
  return network;
}

Options draw_options(Random& random, bool control_only) {
  Options options;
  options.fusion_threshold_bytes = random.pick<std::size_t>({0, 300, 5000, 20000, 1 << 20, 1 << 20});
  options.fusion_copy_limit_bytes = random.pick<std::size_t>({64, 1000, 16384, 16384});
  options.small_limit_bytes = control_only ? 4096 : random.pick<std::size_t>({0, 32, 256, 4096});
  options.segment_bytes = random.pick<std::size_t>({64, 200, 1024, 65536});
  options.cycle_time = random.pick<microseconds>({microseconds(0), microseconds(30), milliseconds(1)});
  options.cache_capacity = random.pick<std::size_t>({0, 1, 2, 5, 65536, 65536});
  options.dynamic_process_sets = true;
  return options;
}

// Draws the parts of a scenario in turn; each may look at what was drawn before.
class Drawing {
 public:
  Drawing(std::uint64_t seed, const ScenarioLimits& limits)
      : random_(Random::mix(seed * 2 + 1) ^ (limits.control_only ? 0x5eedu : 0u)), control_only_(limits.control_only) {
    scenario_.seed = seed;
    scenario_.ranks = random_.between(limits.fewest_ranks, limits.most_ranks);
  }

  Scenario draw() {
    scenario_.network = draw_network(random_, scenario_.ranks);
    scenario_.options = draw_options(random_, control_only_);
    draw_pace();
    draw_sets();
    draw_tensors();
    int batches = random_.between(1, many_ranks() ? 3 : 6);
    for (int batch = 0; batch < batches; ++batch) draw_batch(batch);
    batches += draw_steady_batches(batches);
    remove_sets(batches);
    draw_joins(batches);
    draw_order();
    draw_mishaps();
    draw_fault_of_steady();
    draw_layouts();
    return std::move(scenario_);
  }

 private:
  bool many_ranks() const { return scenario_.ranks >= kManyRanks; }

  void draw_pace() {
    scenario_.longest_think =
        random_.pick<Duration>({Duration(0), microseconds(2), microseconds(100), milliseconds(2)});
    scenario_.think_percent = random_.pick({5, 20, 60});
    scenario_.longest_dispatch = random_.pick<Duration>({Duration(0), microseconds(3), microseconds(60)});
    // Ranks that wake up late find much to do at once, which makes the farewell of a thousand ranks affordable.
    if (many_ranks()) scenario_.longest_dispatch = random_.pick<Duration>({microseconds(60), milliseconds(1)});
    scenario_.steps_at_a_time = random_.pick({0, 0, 1, 3});
    scenario_.waits_after_batch = random_.chance(40);
    scenario_.careless_removal = random_.chance(10);
  }

  std::vector<int> draw_members() {
    std::vector<int> ranks(static_cast<std::size_t>(scenario_.ranks));
    std::iota(ranks.begin(), ranks.end(), 0);
    random_.shuffle(ranks);
    ranks.resize(static_cast<std::size_t>(random_.between(1, std::min(scenario_.ranks, 8))));
    std::sort(ranks.begin(), ranks.end());
    return ranks;
  }

  bool members_are_new(const std::vector<int>& ranks) const {
    return std::none_of(scenario_.sets.begin(), scenario_.sets.end(),
                        [&](const SetPlan& set) { return set.ranks == ranks; });
  }

  void draw_sets() {
    SetPlan everyone;
    everyone.ranks.resize(static_cast<std::size_t>(scenario_.ranks));
    std::iota(everyone.ranks.begin(), everyone.ranks.end(), 0);
    scenario_.sets.push_back(std::move(everyone));
    const int wanted = random_.pick({0, 0, 1, 2, 3});
    for (int i = 0; i < wanted; ++i) {
      std::vector<int> members = draw_members();
      if (members_are_new(members)) scenario_.sets.push_back({std::move(members)});
    }
    usable_slots_ = static_cast<int>(scenario_.sets.size());
  }

  // ---- tensors: what a name stands for, until a later batch changes it ---------------------------------------------

  std::int64_t draw_count(std::size_t element_bytes) {
    if (control_only_) return random_.between(0, 4);
    const int n = scenario_.ranks;
    const int usual = random_.pick({0, 1, 2, n - 1, n, n + 1, 17, 64, 97});
    if (!random_.chance(25)) return usual;
    // Few segments in flight at a time make long runs; a few hundred show all that thousands would.
    const std::size_t most = std::min<std::size_t>(12000, 60 * scenario_.options.segment_bytes) / element_bytes;
    return static_cast<std::int64_t>(random_.below(most) + 1);
  }

  DataType draw_dtype() {
    if (many_ranks()) return random_.pick({DataType::kInt32, DataType::kFloat32, DataType::kFloat64, DataType::kInt64});
    return kDataTypes[random_.below(kDataTypes.size())].type;
  }

  // Rows of `columns` elements, so that shapes of one size differ too.
  Shape draw_shape(std::size_t element_bytes) {
    const std::int64_t count = draw_count(element_bytes);
    if (count > 0 && count % 2 == 0 && random_.chance(40)) return {count / 2, 2};
    if (count == 1 && random_.chance(30)) return {};
    return {count};
  }

  void draw_content(OperationPlan& plan) {
    plan.dtype = draw_dtype();
    const std::vector<int>& members = scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks;
    const std::size_t element = size_of(plan.dtype);
    switch (plan.op) {
      case OpKind::kAllreduce:
        plan.shape = draw_shape(element);
        plan.reduce_op = random_.pick(
            {ReduceOp::kSum, ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct});
        plan.inexact = plan.dtype == DataType::kFloat32 && random_.chance(40) && plan.reduce_op != ReduceOp::kProduct;
        plan.prescale = plan.postscale = 1.0;
        if (is_floating_point(plan.dtype) && !plan.inexact && plan.reduce_op != ReduceOp::kProduct &&
            random_.chance(20)) {
          plan.prescale = random_.pick({0.5, 2.0, 1.0});
          plan.postscale = random_.pick({0.5, 2.0, 1.0});
        }
        break;
      case OpKind::kAllgather:
      case OpKind::kAlltoall:
        plan.shape = {0};
        if (random_.chance(40)) plan.shape.push_back(random_.between(1, 3));
        draw_rows(plan);
        break;
      case OpKind::kReducescatter:
        plan.shape = {draw_count(element)};
        if (plan.shape.front() > 3 && random_.chance(40)) plan.shape = {plan.shape.front() / 3, 3};
        plan.reduce_op = random_.pick({ReduceOp::kSum, ReduceOp::kAverage});
        break;
      case OpKind::kBroadcast:
        plan.shape = draw_shape(element);
        plan.root = random_.pick(members);
        break;
      case OpKind::kBarrier:
      case OpKind::kProcessSetAdd:
      case OpKind::kProcessSetRemove:
      case OpKind::kJoin:
        plan.dtype = DataType::kUint8;
        break;
    }
    draw_group(plan);
    plan.in_place = random_.chance(50);
  }

  // More tensors that are one operation with the first.
  void draw_group(OperationPlan& plan) {
    plan.more.clear();
    if (plan.op == OpKind::kAllreduce || plan.op == OpKind::kReducescatter || plan.op == OpKind::kAllgather) {
      if (!random_.chance(25)) return;
      const int wanted = random_.between(1, 3);
      for (int i = 0; i < wanted; ++i) plan.more.push_back(draw_member(plan));
    }
  }

  Shape draw_member(const OperationPlan& plan) {
    if (plan.op == OpKind::kAllgather) return {0, random_.between(1, 3)};  // as many rows as the first
    if (plan.op == OpKind::kReducescatter) return {draw_count(size_of(plan.dtype))};
    return draw_shape(size_of(plan.dtype));
  }

  void draw_rows(OperationPlan& plan) {
    const std::size_t members = scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks.size();
    const auto draw = [&] {
      return static_cast<std::int64_t>(control_only_ ? random_.between(0, 2) : random_.pick({0, 1, 2, 5, 40, 150}));
    };
    plan.rows.clear();
    plan.splits.clear();
    for (std::size_t i = 0; i < members; ++i) {
      plan.rows.push_back(draw());
      if (plan.op != OpKind::kAlltoall) continue;
      plan.splits.emplace_back();
      for (std::size_t to = 0; to < members; ++to) plan.splits.back().push_back(random_.chance(20) ? 0 : draw() / 2);
      plan.rows.back() = std::accumulate(plan.splits.back().begin(), plan.splits.back().end(), std::int64_t{0});
    }
  }

  OpKind draw_kind(int slot) {
    // A ring over a thousand ranks costs a million messages, and shows nothing that eight ranks do not.
    const bool large = scenario_.sets[static_cast<std::size_t>(slot)].ranks.size() >= kManyRanks;
    if (!large && random_.chance(35)) {
      return random_.pick({OpKind::kAllgather, OpKind::kReducescatter, OpKind::kAlltoall});
    }
    return random_.pick({OpKind::kAllreduce, OpKind::kAllreduce, OpKind::kBroadcast, OpKind::kBarrier});
  }

  OperationPlan draw_tensor(int slot) {
    OperationPlan plan;
    plan.slot = slot;
    plan.op = draw_kind(slot);
    plan.name = fmt::format("{}.{}", random_.pick({"layer/weight", "x"}), tensors_.size());
    draw_content(plan);
    return plan;
  }

  // As the gradients of a model are: many, of one type, summed in one set. These get fused.
  OperationPlan draw_gradient() {
    OperationPlan plan = gradient_;
    plan.name = fmt::format("grad.{}", tensors_.size());
    plan.shape = draw_shape(size_of(plan.dtype));
    plan.in_place = random_.chance(50);
    return plan;
  }

  void draw_tensors() {
    const auto draw_slot = [&] { return static_cast<int>(random_.below(static_cast<std::uint64_t>(usable_slots_))); };
    const bool has_gradients = random_.chance(60);
    gradient_.is_gradient = true;
    gradient_.slot = draw_slot();
    gradient_.dtype = draw_dtype();
    gradient_.reduce_op = random_.pick({ReduceOp::kSum, ReduceOp::kAverage, ReduceOp::kMax});
    gradient_.inexact = gradient_.dtype == DataType::kFloat32 && random_.chance(60);
    const int wanted = random_.between(1, many_ranks() ? 6 : random_.pick({4, 12, 30, 30}));
    for (int i = 0; i < wanted; ++i) {
      const bool alike = has_gradients && random_.chance(75);
      tensors_.push_back(alike ? draw_gradient() : draw_tensor(draw_slot()));
    }
  }

  // ---- batches
  // -------------------------------------------------------------------------------------------------------

  void draw_batch(int batch) {
    for (OperationPlan& tensor : tensors_) {
      if (!random_.chance(85)) continue;
      if (random_.chance(8)) change(tensor);
      if (!tensor.rows.empty() && random_.chance(20)) draw_rows(tensor);
      add(tensor, batch);
    }
    if (!many_ranks() && random_.chance(25)) {
      OperationPlan plan = draw_tensor(0);
      plan.unnamed = true;
      plan.name = generated_name(unnamed_[plan.op]++);
      add(plan, batch);
    }
    if (scenario_.sets.size() < 6 && random_.chance(20)) add_set(batch);
  }

  // One tensor again and again, alone, as the mean of a loss is: its response comes to stand. Now and then it has
  // company, or another shape. From a generator of its own. The number of batches.
  int draw_steady_batches(int begin) {
    Random random(Random::mix(scenario_.seed) + 29);
    scenario_.options.standing_after = random.pick({0, 1, 1, 2, 4});
    scenario_.options.standing_limit_bytes = random.pick<std::size_t>({100, 1 << 20, 1 << 20});
    if (many_ranks() || !random.chance(40)) return 0;
    has_steady_ = true;
    scenario_.waits_after_batch = true;
    scenario_.joins_at_once = random.chance(50);
    std::vector<OperationPlan> steady;
    const int wanted = random.between(1, 2);
    for (int i = 0; i < wanted; ++i) {
      OperationPlan plan;
      plan.slot = static_cast<int>(random.below(static_cast<std::uint64_t>(usable_slots_)));
      plan.name = fmt::format("loss.{}", i);
      plan.shape = {random.pick({1, 2, 7, 64, 300})};
      plan.dtype = random.pick({DataType::kFloat32, DataType::kFloat64, DataType::kInt32});
      plan.inexact = plan.dtype == DataType::kFloat32 && random.chance(50);
      plan.in_place = random.chance(70);
      steady.push_back(std::move(plan));
    }
    const int batches = random.between(3, 20);
    for (int batch = begin; batch < begin + batches; ++batch) {
      OperationPlan& plan = steady[random.below(steady.size())];
      if (random.chance(4)) plan.shape = {random.pick({1, 5, 120})};
      add(plan, batch);
      if (random.chance(12) && &plan != &steady.back()) add(steady.back(), batch);
      if (random.chance(8) && !tensors_.empty()) add(random.pick(tensors_), batch);
    }
    return batches;
  }

  // A transfer that fails while a response stands, and some rank may end it. From a generator of its own.
  void draw_fault_of_steady() {
    Random random(Random::mix(scenario_.seed) + 31);
    const bool stands = has_steady_ && scenario_.options.standing_after > 0;
    if (!stands || control_only_ || !scenario_.is_undisturbed() || !random.chance(30)) return;
    scenario_.fault = TransferFault{random.between(0, scenario_.ranks - 1), random.chance(50), random.between(1, 150)};
  }

  // Another tensor under the same name.
  void change(OperationPlan& tensor) {
    if (tensor.is_gradient) {
      tensor.shape = draw_shape(size_of(tensor.dtype));
    } else {
      draw_content(tensor);
    }
  }

  void add(OperationPlan plan, int batch) {
    plan.batch = batch;
    scenario_.operations.push_back(std::move(plan));
  }

  void add_set(int batch) {
    SetPlan set;
    set.added_on_the_way = true;
    set.ranks = draw_members();
    if (!members_are_new(set.ranks)) return;
    OperationPlan plan;
    plan.op = OpKind::kProcessSetAdd;
    plan.dtype = DataType::kUint8;
    plan.subject = static_cast<int>(scenario_.sets.size());
    plan.name = fmt::format("add.{}", plan.subject);
    plan.shape.assign(set.ranks.begin(), set.ranks.end());
    scenario_.sets.push_back(std::move(set));
    add(plan, batch);
    const int users = random_.between(1, 3);
    for (int i = 0; i < users; ++i) tensors_.push_back(draw_tensor(plan.subject));  // from the next batch on
  }

  void remove_sets(int batches) {
    for (int slot = 1; slot < static_cast<int>(scenario_.sets.size()); ++slot) {
      if (!scenario_.sets[static_cast<std::size_t>(slot)].added_on_the_way || !random_.chance(70)) continue;
      OperationPlan plan;
      plan.op = OpKind::kProcessSetRemove;
      plan.dtype = DataType::kUint8;
      plan.subject = slot;
      plan.name = fmt::format("remove.{}", slot);
      // Careless: beside the last operations of the set. Never beside its addition, which it waits for.
      const bool careless = scenario_.careless_removal && batch_of_addition(slot) < batches - 1;
      add(plan, careless ? batches - 1 : batches);
    }
  }

  int batch_of_addition(int slot) const {
    const auto is_addition = [slot](const OperationPlan& plan) {
      return plan.op == OpKind::kProcessSetAdd && plan.subject == slot;
    };
    return std::find_if(scenario_.operations.begin(), scenario_.operations.end(), is_addition)->batch;
  }

  // Ranks run out of data one after the other, as they do with shards of uneven size, and join.
  void draw_joins(int batches) {
    if (!random_.chance(25)) return;
    for (int rank = 0; rank < scenario_.ranks; ++rank) {
      scenario_.last_batch.push_back(random_.chance(50) ? batches : random_.between(-1, batches));
    }
    OperationPlan join;
    join.op = OpKind::kJoin;
    join.dtype = DataType::kUint8;
    join.name = kJoinName;
    add(join, batches + 1);
  }

  // Unnamed operations of one kind get their names by their order, so they keep it.
  void draw_order() {
    std::stable_sort(scenario_.operations.begin(), scenario_.operations.end(),
                     [](const OperationPlan& a, const OperationPlan& b) { return a.batch < b.batch; });
    const std::vector<OperationPlan>& operations = scenario_.operations;
    const bool same_everywhere = random_.chance(15);
    for (int rank = 0; rank < scenario_.ranks; ++rank) {
      std::vector<int> order;
      for (std::size_t begin = 0; begin < operations.size();) {
        std::vector<int> batch;
        std::size_t end = begin;
        for (; end < operations.size() && operations[end].batch == operations[begin].batch; ++end) {
          if (member(operations[end], rank)) batch.push_back(static_cast<int>(end));
        }
        if (!same_everywhere) random_.shuffle(batch);
        keep_order_of_unnamed(batch);
        order.insert(order.end(), batch.begin(), batch.end());
        begin = end;
      }
      scenario_.order.push_back(std::move(order));
    }
  }

  void keep_order_of_unnamed(std::vector<int>& batch) const {
    std::vector<int> unnamed;
    const auto is_unnamed = [&](int i) { return scenario_.operations[static_cast<std::size_t>(i)].unnamed; };
    std::copy_if(batch.begin(), batch.end(), std::back_inserter(unnamed), is_unnamed);
    std::sort(unnamed.begin(), unnamed.end());
    auto next = unnamed.begin();
    for (int& index : batch) {
      if (is_unnamed(index)) index = *next++;
    }
  }

  bool member(const OperationPlan& plan, int rank) const {
    return scenario_.sets[static_cast<std::size_t>(plan.slot)].contains(rank) && scenario_.takes_part(plan, rank);
  }

  // ---- what goes wrong
  // -------------------------------------------------------------------------------------------------

  void draw_mishaps() {
    if (scenario_.operations.empty()) return;
    if (random_.chance(35)) {
      const int wanted = random_.between(1, 3);
      for (int i = 0; i < wanted; ++i) make_odd(scenario_.operations[random_.below(scenario_.operations.size())]);
    }
    if (random_.chance(20)) {
      OperationPlan& plan = scenario_.operations[random_.below(scenario_.operations.size())];
      if (!plan.unnamed) plan.twice_rank = random_.pick(scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks);
    }
    const int dice = random_.between(0, 99);
    if (dice < 14) scenario_.death = draw_incident();
    if (dice >= 12 && dice < 26) scenario_.shutdown = draw_incident();
    if (dice >= 26 && dice < 40 && !control_only_) {
      scenario_.fault = TransferFault{random_.between(0, scenario_.ranks - 1), random_.chance(50), draw_passage()};
    }
    if (dice >= 40 && dice < 44) draw_absent_rank();
    if (dice >= 50 && dice < 55) draw_hang();
    if (dice >= 44 && dice < 50) {  // ranks so slow that the others ask for them, and come in the end
      scenario_.options.stall_check_time = std::chrono::seconds(1);
      scenario_.longest_think = std::chrono::seconds(4);
    }
  }

  int draw_passage() { return random_.between(1, random_.pick({3, 30, 300})); }

  Incident draw_incident() {
    std::size_t total = 0;
    for (const std::vector<int>& order : scenario_.order) total += order.size();
    return {
        random_.between(0, scenario_.ranks - 1), static_cast<int>(random_.below(total + 1)),
        random_.duration(Duration(0), random_.pick<Duration>({microseconds(5), microseconds(100), milliseconds(2)}))};
  }

  void draw_hang() {
    scenario_.hang = draw_incident();
    scenario_.shutdown = Incident{(scenario_.hang->rank + random_.between(1, scenario_.ranks - 1)) % scenario_.ranks, 0,
                                  random_.duration(Duration(0), milliseconds(20))};
  }

  void draw_absent_rank() {
    if (!scenario_.last_batch.empty()) return;  // a rank that joins is missed by nobody
    OperationPlan& plan = scenario_.operations[random_.below(scenario_.operations.size())];
    const std::vector<int>& members = scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks;
    if (members.size() < 2 || plan.unnamed) return;
    const int absent = random_.pick(members);
    // Nor any later one of that name: it would be taken for this one.
    const auto begin = scenario_.operations.begin() + (&plan - scenario_.operations.data());
    for (auto later = begin; later != scenario_.operations.end(); ++later) {
      if (later->op == plan.op && later->slot == plan.slot && later->name == plan.name) later->absent_rank = absent;
    }
    plan.twice_rank = -1;
    scenario_.has_absent_rank = true;
    // Without the questions of the others only the coordinator's own deadline can end the wait.
    scenario_.options.stall_check_time = random_.pick({std::chrono::seconds(0), std::chrono::seconds(1)});
    scenario_.options.stall_shutdown_time = std::chrono::seconds(3);
  }

  // ---- memory -----------------------------------------------------------------------------------------------------

  // Tensors of several dimensions whose memory is in another order, mostly the same each time and on all ranks. From
  // a generator of its own.
  void draw_layouts() {
    Random random(Random::mix(scenario_.seed) + 11);
    std::map<std::tuple<int, OpKind, std::string>, std::uint64_t> layouts;
    for (OperationPlan& plan : scenario_.operations) {
      if (plan.op != OpKind::kAllreduce && plan.op != OpKind::kBroadcast) continue;
      add_dimension(plan.shape);
      for (Shape& shape : plan.more) add_dimension(shape);
      std::uint64_t& layout = layouts[{plan.slot, plan.op, plan.name}];
      if (layout == 0 || random.chance(10)) layout = random.chance(50) ? random.next() | 1 : 0;
      plan.layout = layout;
      plan.layouts_differ = random.chance(20);
    }
  }

  static void add_dimension(Shape& shape) {
    if (shape.size() == 2 && shape.front() % 2 == 0 && shape.front() > 2) shape = {2, shape.front() / 2, shape.back()};
  }

  void make_odd(OperationPlan& plan) {
    using Odd = OperationPlan::Odd;
    const std::vector<int>& members = scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks;
    if (members.size() < 2 || scenario_.present(plan).size() < members.size()) return;
    switch (plan.op) {
      case OpKind::kAllreduce:
        plan.odd = random_.pick({Odd::kDataType, Odd::kShape, Odd::kReduceOp, Odd::kPrescale});
        break;
      case OpKind::kReducescatter:
        plan.odd = random_.pick({Odd::kDataType, Odd::kShape, Odd::kPrescale});
        break;
      case OpKind::kAllgather:
      case OpKind::kAlltoall:
        plan.odd = random_.pick({Odd::kDataType, Odd::kShape});
        break;
      case OpKind::kBroadcast:
        plan.odd = random_.pick({Odd::kDataType, Odd::kShape, Odd::kRoot});
        break;
      case OpKind::kProcessSetAdd:
        plan.odd = Odd::kRanks;
        break;
      case OpKind::kBarrier:
      case OpKind::kProcessSetRemove:
      case OpKind::kJoin:
        return;
    }
    plan.odd_rank = random_.pick(members);
  }

  Random random_;
  bool control_only_;
  Scenario scenario_;
  int usable_slots_ = 1;
  bool has_steady_ = false;
  OperationPlan gradient_;  // what the alike ones have in common
  std::vector<OperationPlan> tensors_;
  std::map<OpKind, std::uint64_t> unnamed_;
};

}  // namespace

std::vector<Shape> OperationPlan::shapes(int rank_index) const {
  std::vector<Shape> all{shape};
  all.insert(all.end(), more.begin(), more.end());
  if (rows.empty()) return all;
  for (Shape& one : all) one.front() = rows[static_cast<std::size_t>(rank_index)];
  return all;
}

std::vector<int> Scenario::present(const OperationPlan& plan) const {
  std::vector<int> members = sets[static_cast<std::size_t>(plan.slot)].ranks;
  std::erase_if(members, [&](int rank) { return !takes_part(plan, rank); });
  return members;
}

Scenario draw_scenario(std::uint64_t seed, const ScenarioLimits& limits) { return Drawing(seed, limits).draw(); }

std::string summary(const Scenario& scenario) {
  std::string text = fmt::format("{} ranks, {} process sets, {} operations, cache of {}", scenario.ranks,
                                 scenario.sets.size(), scenario.operations.size(), scenario.options.cache_capacity);
  if (scenario.death) text += fmt::format(", rank {} dies", scenario.death->rank);
  if (scenario.hang) text += fmt::format(", rank {} hangs", scenario.hang->rank);
  if (scenario.shutdown) text += fmt::format(", rank {} shuts down", scenario.shutdown->rank);
  if (scenario.fault) text += fmt::format(", a transfer of rank {} fails", scenario.fault->rank);
  if (scenario.has_absent_rank) text += ", an operation that one rank never enqueues";
  if (!scenario.last_batch.empty()) text += ", ranks join";
  if (scenario.careless_removal) text += ", careless removal of sets";
  return text;
}

}  // namespace hvd::simulator
