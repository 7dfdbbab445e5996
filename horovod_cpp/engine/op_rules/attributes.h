// The attributes that several operations share. Pure; any thread.
#pragma once

#include <fmt/format.h>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd::attributes {

inline std::string dtype(const Request& request) { return std::string(name_of(request.dtype)); }
inline std::string shape(const Request& request) { return shape_text(request.shape); }
inline std::string reduce_op(const Request& request) { return std::string(name_of(request.reduce_op)); }
inline std::string prescale(const Request& request) { return fmt::format("{}", request.prescale); }
inline std::string postscale(const Request& request) { return fmt::format("{}", request.postscale); }
inline std::string root_rank(const Request& request) { return fmt::format("{}", request.root_rank); }
inline std::string memory(const Request& /*request*/) { return "host"; }
inline std::string dimensions(const Request& request) { return fmt::format("{}", request.shape.size()); }
inline std::string trailing_shape(const Request& request) {
  if (request.shape.empty()) return "[]";
  return shape_text(Shape(request.shape.begin() + 1, request.shape.end()));
}

/// Everything but the names of memory and of the call site.
inline bool same_agreement(const Request& a, const Request& b) {
  return a.dtype == b.dtype && a.reduce_op == b.reduce_op && a.prescale == b.prescale && a.postscale == b.postscale &&
         a.root_rank == b.root_rank && a.shape == b.shape && a.memory == b.memory;
}

// For operations whose requests are alike on all ranks.
inline bool repeats_alike(const Request& request, const Request& agreed, const ResponseEntry& /*entry*/,
                          int /*index*/) {
  return same_agreement(request, agreed);
}
inline ResponseEntry entry_alike(std::span<const Request* const> requests) {
  return {requests.front()->key.name, requests.front()->shape, {}, 0};
}
inline Request recall_alike(const Request& agreed, const ResponseEntry& /*entry*/, int /*index*/) { return agreed; }

inline Status check_tensor(const Request& request) {
  if (find_data_type(request.dtype) == nullptr) {
    return Status::invalid_argument(fmt::format("data type number {} is not known", static_cast<int>(request.dtype)));
  }
  return element_count(request.shape).status();
}

}  // namespace hvd::attributes
