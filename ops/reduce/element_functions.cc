// The reductions themselves, written once over Highway's vectors and compiled for every instruction set.
// Pure functions of their arguments; any thread.
#include "ops/reduce/element_functions.h"

#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/reduce/element_functions.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ops/reduce/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace hvd::HWY_NAMESPACE {

// ---- Integers and bool ----

struct Add {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};

struct Multiply {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Mul(a, b);
  }
};

struct MultiplyBytes {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    const hn::DFromV<V> d;
#if HWY_TARGET == HWY_SCALAR
    return hn::Set(d, static_cast<std::uint8_t>(hn::GetLane(a) * hn::GetLane(b)));
#else
    const hn::RepartitionToWide<decltype(d)> pairs;
    const auto a_pairs = hn::BitCast(pairs, a);
    const auto b_pairs = hn::BitCast(pairs, b);
    const auto upper = hn::Set(pairs, 0xff00u);
    // The lower byte of a 16-bit product depends on the lower bytes alone.
    const auto even = hn::AndNot(upper, hn::Mul(a_pairs, b_pairs));
    const auto odd = hn::Mul(hn::ShiftRight<8>(a_pairs), hn::And(b_pairs, upper));
    return hn::BitCast(d, hn::Or(even, odd));
#endif
  }
};

struct Minimum {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Min(a, b);
  }
};

struct Maximum {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};

// Any byte but 0 is true; what comes out is 0 or 1.
struct LogicalOr {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Min(hn::Max(a, b), hn::Set(hn::DFromV<V>(), std::uint8_t{1}));
  }
};

struct LogicalAnd {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Min(hn::Min(a, b), hn::Set(hn::DFromV<V>(), std::uint8_t{1}));
  }
};

// ---- Floats ----

// Of two NaNs the processor hands on the one that the compiler happened to put first; here it is always the left one.
template <class V>
HWY_INLINE V prefer_left_nan(V left, V result) {
  const hn::DFromV<V> d;
  const hn::RebindToUnsigned<decltype(d)> bits;
  using Bits = hn::TFromD<decltype(bits)>;
  const auto quiet = hn::BitCast(d, hn::Set(bits, Bits{1} << (hwy::MantissaBits<hn::TFromD<decltype(d)>>() - 1)));
  return hn::IfThenElse(hn::IsNaN(left), hn::Or(left, quiet), result);
}

struct AddFloats {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return prefer_left_nan(a, hn::Add(a, b));
  }
};

struct MultiplyFloats {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return prefer_left_nan(a, hn::Mul(a, b));
  }
};

/// Which of two floats, seen as signed integers of their size, Min and Max keep. `kInfinity`: the bits of +infinity.
template <auto kInfinity>
struct FloatOrder {
  using T = std::remove_const_t<decltype(kInfinity)>;

  template <class V>
  static HWY_INLINE auto is_nan(V v) {
    const hn::DFromV<V> d;
    return hn::Gt(hn::And(v, hn::Set(d, std::numeric_limits<T>::max())), hn::Set(d, kInfinity));
  }

  // Grows with the number: negative floats count downwards in their magnitude, so those bits are turned over.
  template <class V>
  static HWY_INLINE V key(V v) {
    const hn::DFromV<V> d;
    return hn::Xor(v, hn::And(hn::BroadcastSignBit(v), hn::Set(d, std::numeric_limits<T>::max())));
  }

  template <class V, class Mask>
  static HWY_INLINE V pick(V a, V b, Mask right_wins) {
    return hn::IfThenElse(is_nan(a), a, hn::IfThenElse(hn::Or(is_nan(b), right_wins), b, a));
  }
};

template <auto kInfinity>
struct MinimumFloats {
  using Order = FloatOrder<kInfinity>;
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return Order::pick(a, b, hn::Gt(Order::key(a), Order::key(b)));
  }
};

template <auto kInfinity>
struct MaximumFloats {
  using Order = FloatOrder<kInfinity>;
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return Order::pick(a, b, hn::Gt(Order::key(b), Order::key(a)));
  }
};

struct ScaleFloats {
  double factor;

  template <class V>
  HWY_INLINE V operator()(V v) const {
    const hn::DFromV<V> d;
    return MultiplyFloats()(v, hn::Set(d, static_cast<hn::TFromD<decltype(d)>>(factor)));
  }
};

struct DivideFloats {
  int divisor;

  template <class V>
  HWY_INLINE V operator()(V v) const {
    const hn::DFromV<V> d;
    return hn::Div(v, hn::Set(d, static_cast<hn::TFromD<decltype(d)>>(divisor)));
  }
};

// ---- Functions on memory ----

template <class Format, class Operation>
void combine(void* out, const void* lhs, const void* rhs, std::size_t count) {
  using T = hn::TFromD<typename Format::Tag>;
  transform<Format>(Operation(), count, static_cast<T*>(out), static_cast<const T*>(lhs), static_cast<const T*>(rhs));
}

template <class Format>
void scale_floats(void* data, std::size_t count, double factor) {
  // The rounding of bfloat16 asks for NaNs that fit.
  if (factor != factor) factor = std::numeric_limits<double>::quiet_NaN();
  auto* elements = static_cast<hn::TFromD<typename Format::Tag>*>(data);
  transform<Format>(ScaleFloats{factor}, count, elements, elements);
}

template <class Format>
void divide_floats(void* data, std::size_t count, int divisor) {
  auto* elements = static_cast<hn::TFromD<typename Format::Tag>*>(data);
  transform<Format>(DivideFloats{divisor}, count, elements, elements);
}

template <class T>
T saturate(double value) {
  constexpr auto kLowest = std::numeric_limits<T>::min();
  constexpr auto kHighest = std::numeric_limits<T>::max();
  if (value >= static_cast<double>(kHighest)) return kHighest;  // For int64 this double is 2^63, the first too large.
  if (value <= static_cast<double>(kLowest)) return kLowest;
  return value == value ? static_cast<T>(value) : T{0};
}

template <class T>
void scale_integers(void* data, std::size_t count, double factor) {
  for (T& element : std::span(static_cast<T*>(data), count)) {
    element = saturate<T>(static_cast<double>(element) * factor);
  }
}

void scale_bools(void* data, std::size_t count, double factor) {
  for (std::uint8_t& element : std::span(static_cast<std::uint8_t*>(data), count)) {
    element = element != 0 && factor >= 1.0 ? 1 : 0;
  }
}

template <class T>
void divide_integers(void* data, std::size_t count, int divisor) {
  // Up to 32 bits float64 gives the same: a quotient short of an integer is short of it by more than it rounds.
  using Exact = std::conditional_t<sizeof(T) == 8, T, double>;
  for (T& element : std::span(static_cast<T*>(data), count)) {
    element = static_cast<T>(static_cast<Exact>(element) / static_cast<Exact>(divisor));
  }
}

void leave_bools(void*, std::size_t, int) {}

// ---- The table ----

template <class T>
constexpr ElementFunctions integers(DataType type) {
  using Wrapping = Plain<std::make_unsigned_t<T>>;  // Sums and products have the same bits, and unsigned ones wrap.
  using Product = std::conditional_t<sizeof(T) == 1, MultiplyBytes, Multiply>;
  return {type,
          combine<Wrapping, Add>,
          combine<Plain<T>, Minimum>,
          combine<Plain<T>, Maximum>,
          combine<Wrapping, Product>,
          scale_integers<T>,
          divide_integers<T>};
}

template <class Format, auto kInfinity>
constexpr ElementFunctions floats(DataType type) {
  using Bits = Plain<std::remove_const_t<decltype(kInfinity)>>;
  return {type,
          combine<Format, AddFloats>,
          combine<Bits, MinimumFloats<kInfinity>>,
          combine<Bits, MaximumFloats<kInfinity>>,
          combine<Format, MultiplyFloats>,
          scale_floats<Format>,
          divide_floats<Format>};
}

constexpr ElementFunctions bools(DataType type) {
  using Bytes = Plain<std::uint8_t>;
  return {type,
          combine<Bytes, LogicalOr>,
          combine<Bytes, LogicalAnd>,
          combine<Bytes, LogicalOr>,
          combine<Bytes, LogicalAnd>,
          scale_bools,
          leave_bools};
}

constexpr std::array kElementFunctions{
    bools(DataType::kBool),
    integers<std::uint8_t>(DataType::kUint8),
    integers<std::int8_t>(DataType::kInt8),
    integers<std::int16_t>(DataType::kInt16),
    integers<std::int32_t>(DataType::kInt32),
    integers<std::int64_t>(DataType::kInt64),
    floats<Float16, std::int16_t{0x7c00}>(DataType::kFloat16),
    floats<Bfloat16, std::int16_t{0x7f80}>(DataType::kBfloat16),
    floats<Plain<float>, std::int32_t{0x7f80'0000}>(DataType::kFloat32),
    floats<Plain<double>, std::int64_t{0x7ff0'0000'0000'0000}>(DataType::kFloat64),
};

std::span<const ElementFunctions> element_functions() { return kElementFunctions; }

}  // namespace hvd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace hvd {

HWY_EXPORT(element_functions);

const ElementFunctions* find_element_functions(DataType type) {
  for (const ElementFunctions& row : HWY_DYNAMIC_DISPATCH(element_functions)()) {
    if (row.type == type) return &row;
  }
  return nullptr;
}

}  // namespace hvd
#endif  // HWY_ONCE
