#include "ops/reduce/adasum_functions.h"

#include <array>
#include <cstdint>

#include "common/half.h"

namespace hvd {
namespace {

struct Float16 {
  using Stored = std::uint16_t;
  static double load(Stored bits) { return static_cast<double>(float16_to_float(bits)); }
  static Stored store(double value) { return float_to_float16(static_cast<float>(value)); }
};
struct Bfloat16 {
  using Stored = std::uint16_t;
  static double load(Stored bits) { return static_cast<double>(bfloat16_to_float(bits)); }
  static Stored store(double value) { return float_to_bfloat16(static_cast<float>(value)); }
};
template <typename Float>
struct Native {
  using Stored = Float;
  static double load(Float value) { return static_cast<double>(value); }
  static Float store(double value) { return static_cast<Float>(value); }
};

// Several sums side by side: a single one would wait for its last addition each time.
constexpr std::size_t kLanes = 8;

template <typename Format>
DotProducts products(const void* a, const void* b, std::size_t count) {
  const auto* x = static_cast<const Format::Stored*>(a);
  const auto* y = static_cast<const Format::Stored*>(b);
  std::array<DotProducts, kLanes> lanes{};
  for (std::size_t i = 0; i < count; ++i) {
    const double p = Format::load(x[i]);
    const double q = Format::load(y[i]);
    DotProducts& lane = lanes[i % kLanes];
    lane.aa += p * p;
    lane.ab += p * q;
    lane.bb += q * q;
  }
  DotProducts sum;
  for (const DotProducts& lane : lanes) {
    sum.aa += lane.aa;
    sum.ab += lane.ab;
    sum.bb += lane.bb;
  }
  return sum;
}

template <typename Format>
void weighted(void* out, const void* a, double weight_a, const void* b, double weight_b, std::size_t count) {
  const auto* x = static_cast<const Format::Stored*>(a);
  const auto* y = static_cast<const Format::Stored*>(b);
  auto* sum = static_cast<Format::Stored*>(out);
  for (std::size_t i = 0; i < count; ++i) {
    sum[i] = Format::store(weight_a * Format::load(x[i]) + weight_b * Format::load(y[i]));
  }
}

}  // namespace

DotProducts dot_products(DataType type, const void* a, const void* b, std::size_t count) {
  if (type == DataType::kFloat16) return products<Float16>(a, b, count);
  if (type == DataType::kBfloat16) return products<Bfloat16>(a, b, count);
  if (type == DataType::kFloat32) return products<Native<float>>(a, b, count);
  return products<Native<double>>(a, b, count);
}

void add_weighted(DataType type, void* out, const void* a, double weight_a, const void* b, double weight_b,
                  std::size_t count) {
  if (type == DataType::kFloat16) return weighted<Float16>(out, a, weight_a, b, weight_b, count);
  if (type == DataType::kBfloat16) return weighted<Bfloat16>(out, a, weight_a, b, weight_b, count);
  if (type == DataType::kFloat32) return weighted<Native<float>>(out, a, weight_a, b, weight_b, count);
  weighted<Native<double>>(out, a, weight_a, b, weight_b, count);
}

}  // namespace hvd
