// Scalar conversions between float16 or bfloat16, kept as their 16 bits, and float32.
// Pure functions; any thread.
#pragma once

#include <bit>
#include <cstdint>

namespace hvd {

/// Exact. A signalling NaN becomes quiet, its payload stays.
constexpr float float16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude < 0x0400u) {  // Zero or subnormal: a multiple of 2^-24, which float32 holds as a normal number.
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
  }
  const std::uint32_t bias = (magnitude < 0x7c00u ? 112u : 224u) << 23;  // Infinity and NaN keep a full exponent.
  const std::uint32_t quiet = magnitude > 0x7c00u ? 0x0040'0000u : 0u;
  return std::bit_cast<float>(sign | ((magnitude << 13) + bias) | quiet);
}

/// Rounds to nearest, ties to even; what is beyond the range becomes infinity. A NaN keeps its sign and the upper
/// bits of its payload, and becomes quiet.
constexpr std::uint16_t float_to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fff'ffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f80'0000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
  } else if (magnitude >= 0x4780'0000u) {  // 65536 and more.
    half = 0x7c00u;
  } else if (magnitude < 0x3880'0000u) {  // Below 2^-14 the step is 2^-24, as it is for float32 in [0.5, 1).
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(rounded) - std::bit_cast<std::uint32_t>(0.5f);
  } else {
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - (112u << 23) + 0x0fffu + odd) >> 13;  // A carry out of the mantissa steps the exponent.
  }
  return static_cast<std::uint16_t>(sign | half);
}

/// Exact, bit for bit: the upper half of the float32.
constexpr float bfloat16_to_float(std::uint16_t half) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
}

/// Rounds to nearest, ties to even; NaN as in float_to_float16.
constexpr std::uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const bool is_nan = (bits & 0x7fff'ffffu) > 0x7f80'0000u;
  const std::uint32_t odd = (bits >> 16) & 1u;
  return static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x0040u : (bits + 0x7fffu + odd) >> 16);
}

}  // namespace hvd
