#include "tests/simulator/tensor_values.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "common/half.h"
#include "tests/simulator/random.h"

namespace hvd::simulator {
namespace {

// Stores a value as an element; integers wrap as they do in the product.
void store(std::byte* place, DataType dtype, double value) {
  const auto put = [&](auto element) { std::memcpy(place, &element, sizeof(element)); };
  const auto whole = [&] { return static_cast<std::int64_t>(value); };
  switch (dtype) {
    case DataType::kUint8:
      return put(static_cast<std::uint8_t>(whole()));
    case DataType::kInt8:
      return put(static_cast<std::int8_t>(whole()));
    case DataType::kInt16:
      return put(static_cast<std::int16_t>(whole()));
    case DataType::kInt32:
      return put(static_cast<std::int32_t>(whole()));
    case DataType::kInt64:
      return put(whole());
    case DataType::kBool:
      return put(static_cast<std::uint8_t>(value != 0));
    case DataType::kFloat16:
      return put(float_to_float16(static_cast<float>(value)));
    case DataType::kBfloat16:
      return put(float_to_bfloat16(static_cast<float>(value)));
    case DataType::kFloat32:
      return put(static_cast<float>(value));
    case DataType::kFloat64:
      return put(value);
  }
}

// Small whole numbers, so that every sum of up to 8 ranks is exact in every type; products stay within 2^8.
double exact_value(const OperationPlan& plan, std::size_t ranks, std::uint64_t draw) {
  if (plan.dtype == DataType::kBool) return static_cast<double>(draw % 2);
  if (plan.reduce_op == ReduceOp::kProduct) return ranks <= 8 ? static_cast<double>(1 + draw % 2) : 1.0;
  const bool is_signed = plan.dtype != DataType::kUint8;
  return static_cast<double>(draw % 8) - (is_signed ? 3.0 : 0.0);
}

double value_of(const Scenario& scenario, int index, int rank, std::size_t i) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const std::uint64_t draw = Random::mix((static_cast<std::uint64_t>(index) << 44) ^
                                         (static_cast<std::uint64_t>(rank) << 28) ^ static_cast<std::uint64_t>(i)) >>
                             20;
  if (plan.inexact) return static_cast<double>(static_cast<float>(0.1 * static_cast<double>(draw % 1000) - 41.7));
  return exact_value(plan, scenario.sets[static_cast<std::size_t>(plan.slot)].ranks.size(), draw);
}

double combine(ReduceOp op, DataType dtype, double a, double b) {
  switch (op) {
    case ReduceOp::kMin:
      return std::min(a, b);
    case ReduceOp::kMax:
      return std::max(a, b);
    case ReduceOp::kProduct:
      return a * b;
    default:
      return dtype == DataType::kBool ? std::max(a, b) : a + b;
  }
}

double divided(DataType dtype, double sum, std::size_t ranks) {
  if (dtype == DataType::kBool) return sum;
  if (!is_floating_point(dtype)) return std::trunc(sum / static_cast<double>(ranks));
  if (dtype == DataType::kFloat64) return sum / static_cast<double>(ranks);
  const float quotient = static_cast<float>(sum) / static_cast<float>(ranks);
  // Rounded here, since a factor may still follow.
  if (dtype == DataType::kFloat16) return static_cast<double>(float16_to_float(float_to_float16(quotient)));
  if (dtype == DataType::kBfloat16) return static_cast<double>(bfloat16_to_float(float_to_bfloat16(quotient)));
  return static_cast<double>(quotient);
}

std::vector<double> reduced(const Scenario& scenario, int index) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const SetPlan& set = scenario.sets[static_cast<std::size_t>(plan.slot)];
  const std::vector<int> present = scenario.present(plan);  // joined ranks change nothing
  if (present.empty()) return {};
  const std::vector<std::size_t> counts = counts_of(plan, set, present.front());
  std::vector<double> values(std::accumulate(counts.begin(), counts.end(), std::size_t{0}));
  for (std::size_t i = 0; i < values.size(); ++i) {
    double value = value_of(scenario, index, present.front(), i) * plan.prescale;
    for (std::size_t member = 1; member < present.size(); ++member) {
      const double other = value_of(scenario, index, present[member], i) * plan.prescale;
      value = combine(plan.reduce_op, plan.dtype, value, other);
    }
    if (plan.reduce_op == ReduceOp::kAverage) value = divided(plan.dtype, value, set.ranks.size());
    values[i] = value * plan.postscale;
  }
  return values;
}

}  // namespace

std::vector<std::size_t> counts_of(const OperationPlan& plan, const SetPlan& set, int rank) {
  if (plan.op == OpKind::kBarrier || plan.op == OpKind::kJoin || plan.op == OpKind::kProcessSetAdd ||
      plan.op == OpKind::kProcessSetRemove) {
    return {};
  }
  const auto place = std::lower_bound(set.ranks.begin(), set.ranks.end(), rank);
  std::vector<std::size_t> counts;
  for (const Shape& shape : plan.shapes(static_cast<int>(place - set.ranks.begin()))) {
    counts.push_back(static_cast<std::size_t>(element_count(shape).value()));
  }
  return counts;
}

std::vector<std::byte> input_of(const Scenario& scenario, int index, int rank) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const std::vector<std::size_t> counts = counts_of(plan, scenario.sets[static_cast<std::size_t>(plan.slot)], rank);
  const std::size_t count = std::accumulate(counts.begin(), counts.end(), std::size_t{0});
  const std::size_t element = size_of(plan.dtype);
  std::vector<std::byte> bytes(count * element);
  for (std::size_t i = 0; i < count; ++i) {
    store(bytes.data() + i * element, plan.dtype, value_of(scenario, index, rank, i));
  }
  return bytes;
}

namespace {

int member_of(const SetPlan& set, int rank) {
  return static_cast<int>(std::lower_bound(set.ranks.begin(), set.ranks.end(), rank) - set.ranks.begin());
}

// Calls visit(place in C order, place in memory), in elements, for all elements of all tensors.
template <typename Visit>
void for_each_element(const OperationPlan& plan, const SetPlan& set, int rank, Visit visit) {
  const std::vector<std::vector<std::int64_t>> strides = strides_of_tensors(plan, set, rank);
  const std::vector<Shape> shapes = plan.shapes(member_of(set, rank));
  std::int64_t first = 0;
  for (std::size_t tensor = 0; tensor < shapes.size(); ++tensor) {
    const Shape& shape = shapes[tensor];
    const std::int64_t count = element_count(shape).value();
    for (std::int64_t i = 0; i < count; ++i) {
      std::int64_t left = i;
      std::int64_t place = 0;
      for (std::size_t d = shape.size(); d-- > 0; left /= shape[d]) place += left % shape[d] * strides[tensor][d];
      visit(first + i, first + place);
    }
    first += count;
  }
}

}  // namespace

std::vector<std::vector<std::int64_t>> strides_of_tensors(const OperationPlan& plan, const SetPlan& set, int rank) {
  std::vector<std::vector<std::int64_t>> all;
  Random random(Random::mix(plan.layout + (plan.layouts_differ && member_of(set, rank) % 2 == 1 ? 1 : 0)));
  for (const Shape& shape : plan.shapes(member_of(set, rank))) {
    std::vector<std::size_t> fastest_last(shape.size());
    std::iota(fastest_last.begin(), fastest_last.end(), std::size_t{0});
    if (plan.layout != 0) random.shuffle(fastest_last);
    all.emplace_back(shape.size());
    std::int64_t block = 1;
    for (auto dimension = fastest_last.rbegin(); dimension != fastest_last.rend(); ++dimension) {
      all.back()[*dimension] = block;
      block *= shape[*dimension];
    }
  }
  return all;
}

std::vector<std::byte> laid_out(const OperationPlan& plan, const SetPlan& set, int rank,
                                std::span<const std::byte> tensors) {
  std::vector<std::byte> memory(tensors.begin(), tensors.end());
  if (plan.layout == 0) return memory;
  const auto bytes = static_cast<std::int64_t>(size_of(plan.dtype));
  for_each_element(plan, set, rank, [&](std::int64_t in_order, std::int64_t place) {
    std::copy_n(tensors.data() + in_order * bytes, bytes, memory.data() + place * bytes);
  });
  return memory;
}

std::vector<std::byte> in_c_order(const OperationPlan& plan, const SetPlan& set, int rank,
                                  std::span<const std::byte> memory) {
  std::vector<std::byte> tensors(memory.begin(), memory.end());
  if (plan.layout == 0) return tensors;
  const auto bytes = static_cast<std::int64_t>(size_of(plan.dtype));
  for_each_element(plan, set, rank, [&](std::int64_t in_order, std::int64_t place) {
    std::copy_n(memory.data() + place * bytes, bytes, tensors.data() + in_order * bytes);
  });
  return tensors;
}

namespace {

// What a member of an allgather gets: of each tensor the rows of all ranks.
std::vector<std::byte> gathered(const Scenario& scenario, int index) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const SetPlan& set = scenario.sets[static_cast<std::size_t>(plan.slot)];
  std::vector<std::byte> all;
  for (std::size_t tensor = 0; tensor <= plan.more.size(); ++tensor) {
    for (const int rank : set.ranks) {
      const std::vector<std::byte> input = input_of(scenario, index, rank);
      const std::vector<std::size_t> counts = counts_of(plan, set, rank);
      const auto before = static_cast<std::ptrdiff_t>(
          std::accumulate(counts.begin(), counts.begin() + static_cast<std::ptrdiff_t>(tensor), std::size_t{0}) *
          size_of(plan.dtype));
      const auto bytes = static_cast<std::ptrdiff_t>(counts[tensor] * size_of(plan.dtype));
      all.insert(all.end(), input.begin() + before, input.begin() + before + bytes);
    }
  }
  return all;
}

std::int64_t row_bytes(const OperationPlan& plan, const Shape& shape) {
  return element_count(Shape(shape.begin() + 1, shape.end())).value() * static_cast<std::int64_t>(size_of(plan.dtype));
}

// What comes to a member of an alltoall, from each rank in turn.
std::vector<std::byte> exchanged(const Scenario& scenario, int index, std::size_t member) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const std::vector<int>& ranks = scenario.sets[static_cast<std::size_t>(plan.slot)].ranks;
  const std::int64_t row = row_bytes(plan, plan.shape);
  std::vector<std::byte> all;
  for (std::size_t from = 0; from < ranks.size(); ++from) {
    const std::vector<std::byte> input = input_of(scenario, index, ranks[from]);
    const std::vector<std::int64_t>& splits = plan.splits[from];
    const std::int64_t begin =
        std::accumulate(splits.begin(), splits.begin() + static_cast<std::ptrdiff_t>(member), std::int64_t{0}) * row;
    all.insert(all.end(), input.begin() + begin, input.begin() + begin + splits[member] * row);
  }
  return all;
}

// The rows of a member in a whole reduction.
std::vector<std::byte> scattered(const OperationPlan& plan, std::size_t ranks, std::size_t member,
                                 const std::vector<std::byte>& whole) {
  std::vector<std::byte> all;
  std::int64_t offset = 0;
  for (const Shape& shape : plan.shapes(0)) {
    const std::int64_t row = row_bytes(plan, shape);
    const auto parts = static_cast<std::int64_t>(ranks);
    const auto place = static_cast<std::int64_t>(member);
    const auto first = [&](std::int64_t part) {
      return part * (shape.front() / parts) + std::min(part, shape.front() % parts);
    };
    all.insert(all.end(), whole.begin() + offset + first(place) * row, whole.begin() + offset + first(place + 1) * row);
    offset += shape.front() * row;
  }
  return all;
}

}  // namespace

Reference::Reference(const Scenario& scenario, int index)
    : scenario_(scenario),
      index_(index),
      dtype_(scenario.operations[static_cast<std::size_t>(index)].dtype),
      inexact_(scenario.operations[static_cast<std::size_t>(index)].inexact) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  switch (plan.op) {
    case OpKind::kAllreduce:
    case OpKind::kReducescatter: {
      values_ = reduced(scenario, index);
      exact_.resize(values_.size() * size_of(dtype_));
      for (std::size_t i = 0; i < values_.size(); ++i) {
        store(exact_.data() + i * size_of(dtype_), dtype_, values_[i]);
      }
      break;
    }
    case OpKind::kAllgather:
      exact_ = gathered(scenario, index);
      break;
    case OpKind::kBroadcast:
      exact_ = input_of(scenario, index, plan.root);
      break;
    case OpKind::kAlltoall:
    case OpKind::kBarrier:
    case OpKind::kProcessSetAdd:
    case OpKind::kProcessSetRemove:
    case OpKind::kJoin:
      break;
  }
}

std::vector<std::byte> Reference::due(int rank) const {
  const OperationPlan& plan = scenario_.operations[static_cast<std::size_t>(index_)];
  const std::vector<int>& ranks = scenario_.sets[static_cast<std::size_t>(plan.slot)].ranks;
  const auto member = static_cast<std::size_t>(std::lower_bound(ranks.begin(), ranks.end(), rank) - ranks.begin());
  if (plan.op == OpKind::kAlltoall) return exchanged(scenario_, index_, member);
  if (plan.op == OpKind::kReducescatter) return scattered(plan, ranks.size(), member, exact_);
  return exact_;
}

std::string Reference::compare(std::span<const std::byte> result, int rank) const {
  const std::vector<std::byte> exact = due(rank);
  if (result.size() != exact.size()) return fmt::format("{} bytes where {} are due", result.size(), exact.size());
  if (std::equal(result.begin(), result.end(), exact.begin())) return {};
  const std::size_t element = size_of(dtype_);
  for (std::size_t i = 0; i * element < exact.size(); ++i) {
    if (inexact_) {
      float got = 0;
      std::memcpy(&got, result.data() + i * element, sizeof(got));
      const double tolerance = 1e-4 + 1e-5 * std::abs(values_[i]);
      if (std::abs(static_cast<double>(got) - values_[i]) <= tolerance) continue;
      return fmt::format("element {}: {} where {} is due", i, got, values_[i]);
    }
    if (!std::equal(result.begin() + static_cast<std::ptrdiff_t>(i * element),
                    result.begin() + static_cast<std::ptrdiff_t>((i + 1) * element),
                    exact.begin() + static_cast<std::ptrdiff_t>(i * element))) {
      std::string bytes;
      for (std::size_t b = i * element; b < (i + 1) * element; ++b) {
        bytes += fmt::format(" {:02x}/{:02x}", static_cast<unsigned>(result[b]), static_cast<unsigned>(exact[b]));
      }
      return fmt::format("element {} of {} ({}) is wrong: bytes got/due{}", i, exact.size() / element, name_of(dtype_),
                         bytes);
    }
  }
  return {};
}

}  // namespace hvd::simulator
