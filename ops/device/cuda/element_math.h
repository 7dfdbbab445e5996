// What the kernel computes with one element, bit for bit what scale() and divide() of ops/reduce/reducer.h do on the
// host: the same roundings, the same NaNs, the same saturation.
// Pure functions: threads of the kernel run them, and tests on the host, where they are compared with those two.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common/half.h"
#include "ops/device/cuda/host_device.h"
#include "ops/device/device_runtime.h"

namespace hvd::cuda {

// ---- Elements as they lie in memory ----

struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};
struct Bool {
  std::uint8_t byte;
};

template <class To, class From>
HVD_HOST_DEVICE inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// The NaN that the host's processor makes out of, say, infinity times zero has this sign bit.
#if defined(__aarch64__)
inline constexpr bool kNewNanIsNegative = false;
#else
inline constexpr bool kNewNanIsNegative = true;
#endif

/// How a float type is laid out, and the type that computes for it. `widen` and `narrow` are not for NaNs: processors
/// disagree about those, so they never reach arithmetic.
template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = std::uint32_t;
  using Wide = float;
  static constexpr Bits kInfinity = 0x7f80'0000;
  static constexpr Bits kQuiet = 0x0040'0000;
  static HVD_HOST_DEVICE Wide widen(Bits bits) { return bits_as<float>(bits); }
  static HVD_HOST_DEVICE Bits narrow(Wide value) { return bits_as<Bits>(value); }
};

template <>
struct FloatFormat<double> {
  using Bits = std::uint64_t;
  using Wide = double;
  static constexpr Bits kInfinity = 0x7ff0'0000'0000'0000;
  static constexpr Bits kQuiet = 0x0008'0000'0000'0000;
  static HVD_HOST_DEVICE Wide widen(Bits bits) { return bits_as<double>(bits); }
  static HVD_HOST_DEVICE Bits narrow(Wide value) { return bits_as<Bits>(value); }
};

template <>
struct FloatFormat<Float16> {
  using Bits = std::uint16_t;
  using Wide = float;
  static constexpr Bits kInfinity = 0x7c00;
  static constexpr Bits kQuiet = 0x0200;
  static constexpr Bits kSmallestForQuotient = 1;  // as a float it is far from the smallest
#ifdef __CUDA_ARCH__
  static __device__ Wide widen(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ Bits narrow(Wide value) { return __half_as_ushort(__float2half_rn(value)); }
#else
  static HVD_HOST_DEVICE Wide widen(Bits bits) { return float16_to_float(bits); }
  static HVD_HOST_DEVICE Bits narrow(Wide value) { return float_to_float16(value); }
#endif
};

template <>
struct FloatFormat<Bfloat16> {
  using Bits = std::uint16_t;
  using Wide = float;
  static constexpr Bits kInfinity = 0x7f80;
  static constexpr Bits kQuiet = 0x0040;
  static constexpr Bits kSmallestForQuotient = 0x0d80;  // 2^-100: below, a remainder may not be a float any more
#ifdef __CUDA_ARCH__
  static __device__ Wide widen(Bits bits) { return bits_as<float>(static_cast<std::uint32_t>(bits) << 16); }
  static __device__ Bits narrow(Wide value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
#else
  static HVD_HOST_DEVICE Wide widen(Bits bits) { return bfloat16_to_float(bits); }
  static HVD_HOST_DEVICE Bits narrow(Wide value) { return float_to_bfloat16(value); }
#endif
};

template <class T>
inline constexpr bool kIsFloat =
    std::is_floating_point_v<T> || std::is_same_v<T, Float16> || std::is_same_v<T, Bfloat16>;

// ---- Scaling ----

/// element * factor, as scale() with a factor other than 1.
template <class T, class = void>
class Scale;

template <class T>
class Scale<T, std::enable_if_t<kIsFloat<T>>> {
  using Format = FloatFormat<T>;
  using Bits = typename Format::Bits;
  using Wide = typename Format::Wide;

 public:
  HVD_HOST_DEVICE explicit Scale(double factor)
      : factor_(static_cast<Wide>(factor)),
        new_nan_(static_cast<Bits>(Format::kInfinity | Format::kQuiet |
                                   (factor == factor && kNewNanIsNegative ? kSign : Bits{0}))) {}

  HVD_HOST_DEVICE T operator()(T element) const {
    const Bits bits = bits_as<Bits>(element);
    const Wide product = Format::widen(bits) * factor_;
    Bits result = product == product ? Format::narrow(product) : new_nan_;
    if ((bits & static_cast<Bits>(~kSign)) > Format::kInfinity) result = static_cast<Bits>(bits | Format::kQuiet);
    return bits_as<T>(result);
  }

 private:
  static constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));

  Wide factor_;
  Bits new_nan_;  // for a factor that is NaN, that one, positive
};

template <class T>
class Scale<T, std::enable_if_t<std::is_integral_v<T>>> {
 public:
  HVD_HOST_DEVICE explicit Scale(double factor) : factor_(factor) {}

  HVD_HOST_DEVICE T operator()(T element) const {
    const double value = static_cast<double>(element) * factor_;
    if (value >= static_cast<double>(kHighest)) return kHighest;  // For int64 this is 2^63, the first too large.
    if (value <= static_cast<double>(kLowest)) return kLowest;
    return value == value ? static_cast<T>(value) : T{0};
  }

 private:
  static constexpr T kLowest = std::numeric_limits<T>::min();
  static constexpr T kHighest = std::numeric_limits<T>::max();

  double factor_;
};

template <>
class Scale<Bool> {
 public:
  HVD_HOST_DEVICE explicit Scale(double factor) : keeps_(factor >= 1.0) {}

  HVD_HOST_DEVICE Bool operator()(Bool element) const {
    return Bool{static_cast<std::uint8_t>(element.byte != 0 && keeps_ ? 1 : 0)};
  }

 private:
  bool keeps_;
};

// ---- Division ----

/// element / divisor, as divide() with a divisor above 1. A bool is not divided: simplest() takes that away.
template <class T, class = void>
class Divide;

template <class T>
class Divide<T, std::enable_if_t<kIsFloat<T>>> {
  using Format = FloatFormat<T>;
  using Bits = typename Format::Bits;
  using Wide = typename Format::Wide;

 public:
  HVD_HOST_DEVICE explicit Divide(int divisor)
      : divisor_(static_cast<Wide>(divisor)), reciprocal_(Wide{1} / divisor_) {}

  HVD_HOST_DEVICE T operator()(T element) const {
    const Bits bits = bits_as<Bits>(element);
    const auto magnitude = static_cast<Bits>(bits & static_cast<Bits>(~kSign));
    if constexpr (sizeof(T) == 2) {
      // Half of a division's work, and as much as the memory can feed.
      if (magnitude >= Format::kSmallestForQuotient && magnitude < Format::kInfinity) {
        return bits_as<T>(Format::narrow(quotient(Format::widen(bits))));
      }
    }
    Bits result = Format::narrow(Format::widen(bits) / divisor_);
    if (magnitude > Format::kInfinity) result = static_cast<Bits>(bits | Format::kQuiet);
    return bits_as<T>(result);
  }

 private:
  static constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));

  // The correctly rounded quotient, from one that is at most one unit off and its remainder, which is exact; the
  // reciprocal is correctly rounded (P. Markstein, Computation of elementary functions on the IBM RISC System/6000,
  // IBM J. Res. Dev. 34, 1990, theorem 7).
  HVD_HOST_DEVICE Wide quotient(Wide value) const {
    const Wide near = value * reciprocal_;
    return fused(fused(-near, divisor_, value), reciprocal_, near);
  }
  static HVD_HOST_DEVICE Wide fused(Wide a, Wide b, Wide c) {
#ifdef __CUDA_ARCH__
    return fma(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }

  Wide divisor_;
  Wide reciprocal_;
};

template <class T>
class Divide<T, std::enable_if_t<std::is_integral_v<T>>> {
  using Wide = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;

 public:
  HVD_HOST_DEVICE explicit Divide(int divisor) : divisor_(divisor) {}

  HVD_HOST_DEVICE T operator()(T element) const { return static_cast<T>(static_cast<Wide>(element) / divisor_); }

 private:
  Wide divisor_;
};

template <>
class Divide<Bool> {
 public:
  HVD_HOST_DEVICE explicit Divide(int) {}
  HVD_HOST_DEVICE Bool operator()(Bool element) const { return element; }
};

// ---- Both, and a change of type ----

/// What happens to the elements of a launch besides being moved.
enum class Mode : std::uint8_t { kMove, kScale, kDivide, kScaleAndDivide };

template <class From, class To, Mode kMode>
class Convert {
 public:
  using FromType = From;
  using ToType = To;
  static constexpr bool kReads = true;

  HVD_HOST_DEVICE explicit Convert(const DeviceConversion& conversion)
      : scale_(conversion.factor), divide_(conversion.divisor) {}

  HVD_HOST_DEVICE To operator()(From element) const {
    // The element's own type in between: so both roundings happen that two calls on the host would make.
    if constexpr (kMode == Mode::kScale || kMode == Mode::kScaleAndDivide) element = scale_(element);
    if constexpr (kMode == Mode::kDivide || kMode == Mode::kScaleAndDivide) element = divide_(element);
    if constexpr (std::is_same_v<From, To>) {
      return element;
    } else {
      return static_cast<To>(element);
    }
  }

 private:
  Scale<From> scale_;
  Divide<From> divide_;
};

/// Writes one value everywhere and reads nothing.
template <class To>
class Fill {
 public:
  using FromType = To;
  using ToType = To;
  static constexpr bool kReads = false;

  HVD_HOST_DEVICE explicit Fill(const DeviceConversion& conversion) {
    std::memcpy(&value_, &conversion.fill, sizeof value_);
  }
  HVD_HOST_DEVICE To operator()() const { return value_; }

 private:
  To value_;
};

/// The same results with less work: no division of bools, and of floats none by a power of two.
constexpr DeviceConversion simplest(DeviceConversion conversion) {
  if (conversion.from_type == DataType::kBool) conversion.divisor = 1;
  const bool power_of_two = (conversion.divisor & (conversion.divisor - 1)) == 0;
  if (is_floating_point(conversion.from_type) && conversion.factor == 1.0 && power_of_two) {
    conversion.factor = 1.0 / conversion.divisor;  // exact, so that the product rounds as the quotient does
    conversion.divisor = 1;
  }
  return conversion;
}

constexpr Mode mode_of(const DeviceConversion& conversion) {
  if (conversion.factor == 1.0) return conversion.divisor == 1 ? Mode::kMove : Mode::kDivide;
  return conversion.divisor == 1 ? Mode::kScale : Mode::kScaleAndDivide;
}

}  // namespace hvd::cuda
