// How elements in memory become vectors to compute with and go back: plain, through float32, tails and all.
// Included once per instruction set by element_functions.cc; pure functions, any thread.

// The guard of Highway's per-target headers: open once for every target.
#if defined(HVD_OPS_REDUCE_LANES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef HVD_OPS_REDUCE_LANES_INL_H
#undef HVD_OPS_REDUCE_LANES_INL_H
#else
#define HVD_OPS_REDUCE_LANES_INL_H
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/half.h"

HWY_BEFORE_NAMESPACE();
namespace hvd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class D, class Convert, class From>
HWY_INLINE hn::Vec<D> convert_lanes(D to, Convert convert, From from, hn::Vec<From> v) {
  HWY_ALIGN hn::TFromD<From> in[hn::MaxLanes(from)];
  HWY_ALIGN hn::TFromD<D> out[hn::MaxLanes(from)];
  hn::Store(v, from, in);
  for (std::size_t i = 0; i < hn::Lanes(from); ++i) out[i] = convert(in[i]);
  return hn::Load(to, out);
}

/// Elements that are computed with as they are.
template <class T>
struct Plain {
  using Tag = hn::ScalableTag<T>;

  template <class Operation, class... V>
  static HWY_INLINE hn::Vec<Tag> apply(Tag, Operation operation, V... v) {
    return operation(v...);
  }
};

/// IEEE half precision, computed in float32.
struct Float16 {
  using Wide = hn::ScalableTag<float>;
  using Tag = hn::Rebind<std::uint16_t, Wide>;

  template <class Operation, class... V>
  static HWY_INLINE hn::Vec<Tag> apply(Tag, Operation operation, V... v) {
    return narrow(operation(widen(v)...));
  }

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4
  // No instruction converts, and what Highway 1.0.3 does instead neither rounds nor keeps infinities.
  static HWY_INLINE hn::Vec<Wide> widen(hn::Vec<Tag> v) { return convert_lanes(Wide(), float16_to_float, Tag(), v); }
  static HWY_INLINE hn::Vec<Tag> narrow(hn::Vec<Wide> v) { return convert_lanes(Tag(), float_to_float16, Wide(), v); }
#else
  using Half = hn::Rebind<hwy::float16_t, Wide>;
  static HWY_INLINE hn::Vec<Wide> widen(hn::Vec<Tag> v) { return hn::PromoteTo(Wide(), hn::BitCast(Half(), v)); }
  static HWY_INLINE hn::Vec<Tag> narrow(hn::Vec<Wide> v) { return hn::BitCast(Tag(), hn::DemoteTo(Half(), v)); }
#endif
};

/// The upper half of a float32, computed in float32.
struct Bfloat16 {
#if HWY_TARGET == HWY_SCALAR
  using Wide = hn::ScalableTag<float>;
  using Tag = hn::Rebind<std::uint16_t, Wide>;

  template <class Operation, class... V>
  static HWY_INLINE hn::Vec<Tag> apply(Tag, Operation operation, V... v) {
    return convert_lanes(Tag(), float_to_bfloat16, Wide(),
                         operation(convert_lanes(Wide(), bfloat16_to_float, Tag(), v)...));
  }
#else
  using Tag = hn::ScalableTag<std::uint16_t>;
  using Bits = hn::RepartitionToWide<Tag>;
  using Wide = hn::RebindToFloat<Bits>;

  // Even and odd elements are float32 vectors after one instruction each, without any shuffle.
  template <class Operation, class... V>
  static HWY_INLINE hn::Vec<Tag> apply(Tag d, Operation operation, V... v) {
    const hn::Vec<Bits> even = rounded(operation(even_elements(v)...));
    const hn::Vec<Bits> odd = rounded(operation(odd_elements(v)...));
    return hn::BitCast(d, hn::Or(hn::ShiftRight<16>(even), hn::And(odd, upper_half())));
  }

 private:
  static HWY_INLINE hn::Vec<Bits> upper_half() { return hn::Set(Bits(), 0xffff'0000u); }
  static HWY_INLINE hn::Vec<Wide> even_elements(hn::Vec<Tag> v) {
    return hn::BitCast(Wide(), hn::ShiftLeft<16>(hn::BitCast(Bits(), v)));
  }
  static HWY_INLINE hn::Vec<Wide> odd_elements(hn::Vec<Tag> v) {
    return hn::BitCast(Wide(), hn::And(hn::BitCast(Bits(), v), upper_half()));
  }
  // Needs no test for NaN: every NaN here comes from an operand or is the default one, so its lower half is zero and
  // the rounding does not reach the upper half.
  static HWY_INLINE hn::Vec<Bits> rounded(hn::Vec<Wide> v) {
    const hn::Vec<Bits> bits = hn::BitCast(Bits(), v);
    const hn::Vec<Bits> is_odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(Bits(), 1u));
    return hn::Add(bits, hn::Add(is_odd, hn::Set(Bits(), 0x7fffu)));
  }
#endif
};

/// The first `count` elements at `from`, the rest zero; reads nothing beyond them.
template <class D>
HWY_INLINE hn::Vec<D> load_first(D d, const hn::TFromD<D>* from, std::size_t count) {
  HWY_ALIGN hn::TFromD<D> lanes[hn::MaxLanes(d)] = {};
  std::memcpy(lanes, from, count * sizeof(hn::TFromD<D>));
  return hn::Load(d, lanes);
}

template <class D>
HWY_INLINE void store_first(hn::Vec<D> v, D d, hn::TFromD<D>* to, std::size_t count) {
  HWY_ALIGN hn::TFromD<D> lanes[hn::MaxLanes(d)];
  hn::Store(v, d, lanes);
  std::memcpy(to, lanes, count * sizeof(hn::TFromD<D>));
}

/// out[i] = operation(in[i]...) for `count` elements. The tail runs through the same vector code as the body, so the
/// bits of a result do not depend on where an element sits.
template <class Format, class Operation, class T, class... In>
HWY_INLINE void transform(Operation operation, std::size_t count, T* out, const In*... in) {
  const typename Format::Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t i = 0;
  for (; count - i >= 2 * lanes; i += 2 * lanes) {
    const auto first = Format::apply(d, operation, hn::LoadU(d, in + i)...);
    const auto second = Format::apply(d, operation, hn::LoadU(d, in + i + lanes)...);
    hn::StoreU(first, d, out + i);
    hn::StoreU(second, d, out + i + lanes);
  }
  for (; count - i >= lanes; i += lanes) {
    hn::StoreU(Format::apply(d, operation, hn::LoadU(d, in + i)...), d, out + i);
  }
  if (const std::size_t rest = count - i; rest != 0) {
    store_first(Format::apply(d, operation, load_first(d, in + i, rest)...), d, out + i, rest);
  }
}

}  // namespace hvd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HVD_OPS_REDUCE_LANES_INL_H
