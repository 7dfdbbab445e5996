// Which C++ types can be elements of a tensor, and their data types. Pure.
#pragma once

#include <complex>
#include <concepts>
#include <cstddef>
#include <iterator>
#include <ranges>
#include <type_traits>

#include <horovod_cpp/data_type.h>

namespace hvd {

/// `DataTypeOf<T>::value` is the data type of elements of the C++ type T. Specialise it for a 16-bit floating-point
/// type of your own: template <> struct hvd::DataTypeOf<my::half> { static constexpr auto value =
/// hvd::DataType::kFloat16; };
template <typename T>
struct DataTypeOf {};

template <>
struct DataTypeOf<bool> {
  static constexpr DataType value = DataType::kBool;
};
template <>
struct DataTypeOf<std::byte> {
  static constexpr DataType value = DataType::kUint8;
};
template <>
struct DataTypeOf<float> {
  static constexpr DataType value = DataType::kFloat32;
};
template <>
struct DataTypeOf<double> {
  static constexpr DataType value = DataType::kFloat64;
};
/// Of complex numbers it is that of their parts. They can be summed and averaged only.
template <std::floating_point T>
struct DataTypeOf<std::complex<T>> : DataTypeOf<T> {};
template <std::signed_integral T>
struct DataTypeOf<T> {
  static constexpr DataType value = sizeof(T) == 1   ? DataType::kInt8
                                    : sizeof(T) == 2 ? DataType::kInt16
                                    : sizeof(T) == 4 ? DataType::kInt32
                                                     : DataType::kInt64;
};
template <std::unsigned_integral T>
  requires(sizeof(T) == 1 && !std::same_as<T, bool>)
struct DataTypeOf<T> {
  static constexpr DataType value = DataType::kUint8;
};

namespace detail {
template <typename T>
inline constexpr bool kIsComplex = false;
template <typename T>
inline constexpr bool kIsComplex<std::complex<T>> = true;

/// Whether elements of that type have so many bytes. (Without size_of(): g++ 12 with -fsanitize=undefined takes its
/// comparison with nullptr for no constant expression.)
constexpr bool has_bytes(DataType type, std::size_t bytes) {
  for (const DataTypeInfo& row : kDataTypes) {
    if (row.type == type) return row.bytes == bytes;
  }
  return false;
}
}  // namespace detail

/// A type of elements: signed integers, unsigned ones of one byte, float, double, std::complex of these two, bool, and
/// what DataTypeOf was specialised for.
template <typename T>
concept Element = std::is_trivially_copyable_v<T> && requires {
  { DataTypeOf<T>::value } -> std::convertible_to<DataType>;
} && detail::has_bytes(DataTypeOf<T>::value, detail::kIsComplex<T> ? sizeof(T) / 2 : sizeof(T));

/// Dense memory of elements: std::span, std::vector, std::array, an array.
template <typename R>
concept Elements = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> &&
                   Element<std::remove_cv_t<std::ranges::range_value_t<R>>>;
/// The same, that may be written to.
template <typename R>
concept MutableElements = Elements<R> && !std::is_const_v<std::remove_reference_t<std::ranges::range_reference_t<R>>>;

}  // namespace hvd
