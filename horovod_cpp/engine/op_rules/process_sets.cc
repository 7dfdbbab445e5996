#include <algorithm>

#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

constexpr std::array kAttributes{Attribute{"ranks", attributes::shape}};

Status check_add(const Request& request, const Membership& membership) {
  const Shape& ranks = request.shape;
  if (ranks.empty()) return Status::invalid_argument("a process set needs at least one rank");
  for (const std::int64_t rank : ranks) {
    if (rank < 0 || rank >= membership.size()) {
      return Status::invalid_argument(
          fmt::format("rank {} is not one of this job's ranks 0 to {}", rank, membership.size() - 1));
    }
  }
  if (std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) != ranks.end()) {
    return Status::invalid_argument(
        fmt::format("the ranks {} are not ascending and without repeats", shape_text(ranks)));
  }
  return {};
}

Status check_remove(const Request& request, const Membership& /*membership*/) {
  if (request.shape.size() != 1 || request.shape.front() == 0) {
    return Status::invalid_argument("the process set of all ranks cannot be removed");
  }
  return {};
}

}  // namespace

constinit const OpRule kProcessSetAddRule{
    OpKind::kProcessSetAdd,
    /*fusible=*/false,
    /*cacheable=*/false,
    /*groupable=*/false,
    /*runs_with_joined=*/false,
    /*any_order=*/false,        check_add, kAttributes, attributes::repeats_alike, attributes::entry_alike,
    attributes::recall_alike};
constinit const OpRule kProcessSetRemoveRule{
    OpKind::kProcessSetRemove,
    /*fusible=*/false,
    /*cacheable=*/false,
    /*groupable=*/false,
    /*runs_with_joined=*/false,
    /*any_order=*/false,        check_remove, kAttributes, attributes::repeats_alike, attributes::entry_alike,
    attributes::recall_alike};

}  // namespace hvd
