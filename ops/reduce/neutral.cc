#include "ops/reduce/neutral.h"

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/half.h"

namespace hvd {
namespace {

// One element, in its first bytes.
struct Element {
  std::byte bytes[8] = {};
};

template <typename T>
Element element(T value) {
  Element made;
  std::memcpy(made.bytes, &value, sizeof value);
  return made;
}

template <typename T>
Element integer(ReduceOp op) {
  if (op == ReduceOp::kProduct) return element(T{1});
  if (op == ReduceOp::kMin) return element(std::numeric_limits<T>::max());
  if (op == ReduceOp::kMax) return element(std::numeric_limits<T>::min());
  return element(T{0});
}

float floating(ReduceOp op) {
  if (op == ReduceOp::kProduct) return 1.0F;
  if (op == ReduceOp::kMin) return std::numeric_limits<float>::infinity();
  if (op == ReduceOp::kMax) return -std::numeric_limits<float>::infinity();
  return 0.0F;
}

Element neutral(DataType type, ReduceOp op) {
  switch (type) {
    case DataType::kBool:
      return element(static_cast<std::uint8_t>(op == ReduceOp::kProduct || op == ReduceOp::kMin ? 1 : 0));
    case DataType::kUint8:
      return integer<std::uint8_t>(op);
    case DataType::kInt8:
      return integer<std::int8_t>(op);
    case DataType::kInt16:
      return integer<std::int16_t>(op);
    case DataType::kInt32:
      return integer<std::int32_t>(op);
    case DataType::kInt64:
      return integer<std::int64_t>(op);
    case DataType::kFloat16:
      return element(float_to_float16(floating(op)));
    case DataType::kBfloat16:
      return element(float_to_bfloat16(floating(op)));
    case DataType::kFloat32:
      return element(floating(op));
    case DataType::kFloat64:
      return element(static_cast<double>(floating(op)));
  }
  return {};
}

}  // namespace

void fill_neutral(void* data, DataType type, std::size_t count, ReduceOp op) {
  const Element one = neutral(type, op);
  const std::size_t bytes = size_of(type);
  auto* place = static_cast<std::byte*>(data);
  for (std::size_t i = 0; i < count; ++i) std::memcpy(place + i * bytes, one.bytes, bytes);
}

}  // namespace hvd
