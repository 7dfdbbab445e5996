// The attributes that several operations share. Pure; any thread.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd::attributes {

using Sizes = std::span<const std::int64_t>;

inline bool is_complex(const Request& request, std::size_t index) {
  return index == 0 ? request.is_complex : request.more[index - 1].is_complex;
}

// Complex numbers have the name of both parts together.
inline std::string dtype_text(DataType dtype, bool is_complex) {
  return is_complex ? fmt::format("complex{}", 16 * size_of(dtype)) : std::string(name_of(dtype));
}

// Of a group: one text for each of its tensors. As the user has them: complex numbers are one element each.
template <typename Text>
std::string text_of_each(const Request& request, Text text) {
  std::string all;
  std::size_t index = 0;
  for_each_tensor(request, [&](DataType dtype, Sizes shape) {
    const bool complex = is_complex(request, index++);
    if (complex && !shape.empty()) shape = shape.first(shape.size() - 1);
    if (!all.empty()) all += ", ";
    all += text(dtype_text(dtype, complex), shape);
  });
  return all;
}

inline std::string tensors(const Request& request) { return fmt::format("{}", request.more.size() + 1); }
inline std::string dtype(const Request& request) {
  return text_of_each(request, [](const std::string& dtype, Sizes) { return dtype; });
}
inline std::string shape(const Request& request) {
  return text_of_each(request, [](const std::string&, Sizes shape) { return shape_text(shape); });
}
inline std::string reduce_op(const Request& request) { return std::string(name_of(request.reduce_op)); }
inline std::string prescale(const Request& request) { return fmt::format("{}", request.prescale); }
inline std::string postscale(const Request& request) { return fmt::format("{}", request.postscale); }
inline std::string root_rank(const Request& request) { return fmt::format("{}", request.root_rank); }
inline std::string memory(const Request& request) { return std::string(name_of(request.memory)); }
inline std::string dimensions(const Request& request) {
  return text_of_each(request, [](const std::string&, Sizes shape) { return fmt::format("{}", shape.size()); });
}
inline std::string trailing_shape(const Request& request) {
  return text_of_each(request, [](const std::string&, Sizes shape) {
    return shape.empty() ? std::string("[]") : shape_text(shape.subspan(1));
  });
}

/// Of operations that reduce.
inline constexpr std::array kReduction{Attribute{"number of tensors", tensors},
                                       Attribute{"data type", dtype},
                                       Attribute{"shape", shape},
                                       Attribute{"reduction", reduce_op},
                                       Attribute{"prescale factor", prescale},
                                       Attribute{"postscale factor", postscale},
                                       Attribute{"memory", memory}};
/// Of operations to which ranks may bring different numbers of rows.
inline constexpr std::array kRows{Attribute{"number of tensors", tensors}, Attribute{"data type", dtype},
                                  Attribute{"number of dimensions", dimensions},
                                  Attribute{"shape after the first dimension", trailing_shape},
                                  Attribute{"memory", memory}};

/// Everything but the names of memory and of the call site.
inline bool same_agreement(const Request& a, const Request& b) {
  return a.dtype == b.dtype && a.reduce_op == b.reduce_op && a.prescale == b.prescale && a.postscale == b.postscale &&
         a.root_rank == b.root_rank && a.shape == b.shape && a.order == b.order && a.is_complex == b.is_complex &&
         a.more == b.more && a.memory == b.memory;
}

// For operations whose requests are alike on all ranks.
inline bool repeats_alike(const Request& request, const Request& agreed, const ResponseEntry& /*entry*/,
                          int /*index*/) {
  return same_agreement(request, agreed);
}
// Ranks may lay out a tensor differently in memory, as autograd does with gradients: then the call takes it in C order.
inline ResponseEntry entry_alike(std::span<const Request* const> requests) {
  const Request& first = *requests.front();
  ResponseEntry entry{first.key.name, first.shape, {}, 0, first.more, first.order, first.is_complex, {}};
  for (const Request* other : requests.subspan(1)) {
    if (other->order != entry.order) entry.order = kCOrder;
    for (std::size_t i = 0; i < std::min(entry.more.size(), other->more.size()); ++i) {
      if (other->more[i].order != entry.more[i].order) entry.more[i].order = kCOrder;
    }
  }
  return entry;
}
inline Request recall_alike(const Request& agreed, const ResponseEntry& /*entry*/, int /*index*/) { return agreed; }

inline Status check_tensor(DataType type, const Shape& sizes) {
  if (find_data_type(type) == nullptr) {
    return Status::invalid_argument(fmt::format("data type number {} is not known", static_cast<int>(type)));
  }
  return element_count(sizes).status();
}

inline Status check_tensors(const Request& request) {
  Status checked;
  for_each_tensor(request, [&](DataType dtype, const Shape& shape) {
    if (checked.ok()) checked = check_tensor(dtype, shape);
  });
  return checked;
}

/// Whether one of the tensors has no first dimension.
inline bool has_scalar(const Request& request) {
  const auto is_scalar = [](const auto& tensor) { return tensor.shape.size() == (tensor.is_complex ? 1 : 0); };
  return is_scalar(request) || std::any_of(request.more.begin(), request.more.end(), is_scalar);
}

}  // namespace hvd::attributes
