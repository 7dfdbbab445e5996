#include "tests/simulator/tensor_values.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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
  std::vector<double> values(count_of(plan, set, set.ranks.front()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    double value = value_of(scenario, index, set.ranks.front(), i) * plan.prescale;
    for (std::size_t member = 1; member < set.ranks.size(); ++member) {
      const double other = value_of(scenario, index, set.ranks[member], i) * plan.prescale;
      value = combine(plan.reduce_op, plan.dtype, value, other);
    }
    if (plan.reduce_op == ReduceOp::kAverage) value = divided(plan.dtype, value, set.ranks.size());
    values[i] = value * plan.postscale;
  }
  return values;
}

}  // namespace

std::size_t count_of(const OperationPlan& plan, const SetPlan& set, int rank) {
  if (plan.op == OpKind::kBarrier || plan.op == OpKind::kProcessSetAdd || plan.op == OpKind::kProcessSetRemove) {
    return 0;
  }
  Shape shape = plan.shape;
  if (plan.op == OpKind::kAllgather) {
    const auto place = std::lower_bound(set.ranks.begin(), set.ranks.end(), rank);
    shape.front() = plan.rows[static_cast<std::size_t>(place - set.ranks.begin())];
  }
  return static_cast<std::size_t>(element_count(shape).value());
}

std::vector<std::byte> input_of(const Scenario& scenario, int index, int rank) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  const std::size_t count = count_of(plan, scenario.sets[static_cast<std::size_t>(plan.slot)], rank);
  const std::size_t element = size_of(plan.dtype);
  std::vector<std::byte> bytes(count * element);
  for (std::size_t i = 0; i < count; ++i) {
    store(bytes.data() + i * element, plan.dtype, value_of(scenario, index, rank, i));
  }
  return bytes;
}

Reference::Reference(const Scenario& scenario, int index)
    : dtype_(scenario.operations[static_cast<std::size_t>(index)].dtype),
      inexact_(scenario.operations[static_cast<std::size_t>(index)].inexact) {
  const OperationPlan& plan = scenario.operations[static_cast<std::size_t>(index)];
  switch (plan.op) {
    case OpKind::kAllreduce: {
      values_ = reduced(scenario, index);
      exact_.resize(values_.size() * size_of(dtype_));
      for (std::size_t i = 0; i < values_.size(); ++i) {
        store(exact_.data() + i * size_of(dtype_), dtype_, values_[i]);
      }
      break;
    }
    case OpKind::kAllgather:
      for (const int rank : scenario.sets[static_cast<std::size_t>(plan.slot)].ranks) {
        const std::vector<std::byte> block = input_of(scenario, index, rank);
        exact_.insert(exact_.end(), block.begin(), block.end());
      }
      break;
    case OpKind::kBroadcast:
      exact_ = input_of(scenario, index, plan.root);
      break;
    case OpKind::kBarrier:
    case OpKind::kProcessSetAdd:
    case OpKind::kProcessSetRemove:
      break;
  }
}

std::string Reference::compare(std::span<const std::byte> result) const {
  if (result.size() != exact_.size()) return fmt::format("{} bytes where {} are due", result.size(), exact_.size());
  if (std::equal(result.begin(), result.end(), exact_.begin())) return {};
  const std::size_t element = size_of(dtype_);
  for (std::size_t i = 0; i * element < exact_.size(); ++i) {
    if (inexact_) {
      float got = 0;
      std::memcpy(&got, result.data() + i * element, sizeof(got));
      const double tolerance = 1e-4 + 1e-5 * std::abs(values_[i]);
      if (std::abs(static_cast<double>(got) - values_[i]) <= tolerance) continue;
      return fmt::format("element {}: {} where {} is due", i, got, values_[i]);
    }
    if (!std::equal(result.begin() + static_cast<std::ptrdiff_t>(i * element),
                    result.begin() + static_cast<std::ptrdiff_t>((i + 1) * element),
                    exact_.begin() + static_cast<std::ptrdiff_t>(i * element))) {
      std::string bytes;
      for (std::size_t b = i * element; b < (i + 1) * element; ++b) {
        bytes += fmt::format(" {:02x}/{:02x}", static_cast<unsigned>(result[b]), static_cast<unsigned>(exact_[b]));
      }
      return fmt::format("element {} of {} ({}) is wrong: bytes got/due{}", i, exact_.size() / element, name_of(dtype_),
                         bytes);
    }
  }
  return {};
}

}  // namespace hvd::simulator
