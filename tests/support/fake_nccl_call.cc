#include "tests/support/fake_nccl_call.h"

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "common/check.h"
#include "ops/reduce/reducer.h"

namespace hvd::testing::fake_nccl {
namespace {

std::optional<DataType> data_type(ElementType type) {
  switch (type) {
    case nccl::kInt8:
      return DataType::kInt8;
    case nccl::kUint8:
      return DataType::kUint8;
    case nccl::kInt32:
      return DataType::kInt32;
    case nccl::kInt64:
      return DataType::kInt64;
    case nccl::kFloat16:
      return DataType::kFloat16;
    case nccl::kFloat32:
      return DataType::kFloat32;
    case nccl::kFloat64:
      return DataType::kFloat64;
    case nccl::kBfloat16:
      return DataType::kBfloat16;
    default:
      return std::nullopt;  // this library has no uint32 and uint64
  }
}

ReduceOp reduce_op(RedOp op) {
  constexpr std::array ops{ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMax, ReduceOp::kMin, ReduceOp::kAverage};
  return ops[op];
}

using Bytes = std::vector<std::byte>;

Bytes input_of(const Call& call, std::size_t offset, std::size_t bytes) {
  const auto* begin = static_cast<const std::byte*>(call.send) + offset;
  return {begin, begin + bytes};
}

/// `count` elements from `offset_bytes` of all inputs, reduced in the order of ranks.
Bytes reduced(std::span<const Call> calls, std::size_t offset_bytes, std::size_t count) {
  const Call& call = calls[0];
  const DataType type = *data_type(call.type);
  const Reducer reducer = find_reducer(type, reduce_op(call.op)).value();
  const std::size_t bytes = count * reducer.element_bytes;
  Bytes sum = input_of(call, offset_bytes, bytes);
  for (std::size_t rank = 1; rank < calls.size(); ++rank) {
    const Bytes next = input_of(calls[rank], offset_bytes, bytes);
    reducer.combine(sum.data(), sum.data(), next.data(), count);
  }
  if (call.op == nccl::kAvg) HVD_CHECK(divide(sum.data(), type, count, static_cast<int>(calls.size())).ok());
  return sum;
}

Bytes gathered(std::span<const Call> calls) {
  Bytes all;
  for (const Call& call : calls) {
    const Bytes part = input_of(call, 0, call.bytes());
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

}  // namespace

std::string signature(const Call& call) {
  if (call.is_pair()) return fmt::format("{} {}", call.count, kTypeNames[call.type]);
  std::string text =
      fmt::format("{} of {} {}", kCallNames[static_cast<std::size_t>(call.kind)], call.count, kTypeNames[call.type]);
  if (call.reduces()) text += fmt::format(" ({})", kOpNames[call.op]);
  if (call.kind == CallKind::kBroadcast || call.kind == CallKind::kReduce) text += fmt::format(" root {}", call.peer);
  return text;
}

bool is_valid(const Call& call, int size) {
  if (call.type < 0 || static_cast<std::size_t>(call.type) >= kTypeBytes.size()) return false;
  if (call.peer < 0 || call.peer >= size) return false;
  return !call.reduces() ||
         (call.op >= 0 && static_cast<std::size_t>(call.op) < kOpNames.size() && data_type(call.type).has_value());
}

CallRanges ranges_of(const Call& call, int rank, int size) {
  const std::size_t bytes = call.bytes();
  const std::size_t all_bytes = bytes * static_cast<std::size_t>(size);
  const auto ranges = [&]() -> std::pair<std::size_t, std::size_t> {
    switch (call.kind) {
      case CallKind::kAllReduce:
        return {bytes, bytes};
      case CallKind::kAllGather:
        return {bytes, all_bytes};
      case CallKind::kReduceScatter:
        return {all_bytes, bytes};
      case CallKind::kBroadcast:
        return {rank == call.peer ? bytes : 0, bytes};
      case CallKind::kReduce:
        return {bytes, rank == call.peer ? bytes : 0};
      case CallKind::kSend:
        return {bytes, 0};
      case CallKind::kReceive:
        return {0, bytes};
    }
    return {0, 0};
  }();
  return {{call.send, ranges.first}, {call.receive, ranges.second}};
}

bool is_in_place_or_apart(const Call& call, int rank, int size) {
  const CallRanges ranges = ranges_of(call, rank, size);
  if (!overlap(ranges.read, ranges.write)) return true;
  const auto* send = static_cast<const std::byte*>(call.send);
  const auto* receive = static_cast<const std::byte*>(call.receive);
  const std::size_t offset = static_cast<std::size_t>(rank) * call.bytes();
  if (call.kind == CallKind::kAllGather) return send == receive + offset;
  if (call.kind == CallKind::kReduceScatter) return receive == send + offset;
  return send == receive;
}

void take_place(std::span<const Call> calls) {
  const Call& call = calls[0];
  const auto root = static_cast<std::size_t>(call.peer);
  // All of the results first, since outputs may be inputs.
  std::vector<Bytes> outputs(calls.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    switch (call.kind) {
      case CallKind::kAllReduce:
        outputs[i] = reduced(calls, 0, call.count);
        break;
      case CallKind::kReduceScatter:
        outputs[i] = reduced(calls, i * call.bytes(), call.count);
        break;
      case CallKind::kAllGather:
        outputs[i] = gathered(calls);
        break;
      case CallKind::kBroadcast:
        outputs[i] = input_of(calls[root], 0, call.bytes());
        break;
      case CallKind::kReduce:
        if (i == root) outputs[i] = reduced(calls, 0, call.count);
        break;
      case CallKind::kSend:  // the first sends, the second receives
      case CallKind::kReceive:
        if (i == 1) outputs[i] = input_of(call, 0, call.bytes());
        break;
    }
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].empty()) std::memcpy(calls[i].receive, outputs[i].data(), outputs[i].size());
  }
}

}  // namespace hvd::testing::fake_nccl
