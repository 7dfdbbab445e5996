// Element types of tensors: one table for their sizes and names.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace hvd {

/// The numbers are part of the C ABI and of the wire format: never reuse one.
enum class DataType : std::uint8_t {
  kUint8 = 0,
  kInt8 = 1,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBool = 9,
  kBfloat16 = 10,
};

struct DataTypeInfo {
  DataType type;
  std::size_t bytes;
  std::string_view name;
};

inline constexpr std::array kDataTypes{
    DataTypeInfo{DataType::kUint8, 1, "uint8"},     DataTypeInfo{DataType::kInt8, 1, "int8"},
    DataTypeInfo{DataType::kInt16, 2, "int16"},     DataTypeInfo{DataType::kInt32, 4, "int32"},
    DataTypeInfo{DataType::kInt64, 8, "int64"},     DataTypeInfo{DataType::kFloat16, 2, "float16"},
    DataTypeInfo{DataType::kFloat32, 4, "float32"}, DataTypeInfo{DataType::kFloat64, 8, "float64"},
    DataTypeInfo{DataType::kBool, 1, "bool"},       DataTypeInfo{DataType::kBfloat16, 2, "bfloat16"},
};

/// The row of `type`, or nullptr for a number that names no type (bytes from a peer or a caller).
constexpr const DataTypeInfo* find_data_type(DataType type) {
  for (const DataTypeInfo& row : kDataTypes) {
    if (row.type == type) return &row;
  }
  return nullptr;
}

/// Bytes of one element; 0 for an unknown number.
constexpr std::size_t size_of(DataType type) {
  const DataTypeInfo* row = find_data_type(type);
  return row != nullptr ? row->bytes : 0;
}

constexpr std::string_view name_of(DataType type) {
  const DataTypeInfo* row = find_data_type(type);
  return row != nullptr ? row->name : "unknown type";
}

constexpr bool is_floating_point(DataType type) {
  return type == DataType::kFloat16 || type == DataType::kBfloat16 || type == DataType::kFloat32 ||
         type == DataType::kFloat64;
}

}  // namespace hvd
