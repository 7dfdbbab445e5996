#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

constexpr std::array kAttributes{Attribute{"data type", attributes::dtype}, Attribute{"shape", attributes::shape},
                                 Attribute{"root rank", attributes::root_rank},
                                 Attribute{"memory", attributes::memory}};

Status check(const Request& request, const Membership& membership) {
  HVD_RETURN_IF_ERROR(attributes::check_tensors(request));
  if (!membership.contains(request.root_rank)) {
    return Status::invalid_argument(
        fmt::format("broadcast received invalid root rank {} for provided process set", request.root_rank));
  }
  return {};
}

}  // namespace

constinit const OpRule kBroadcastRule{
    OpKind::kBroadcast,
    /*fusible=*/false,
    /*cacheable=*/true,
    /*groupable=*/false,
    /*runs_with_joined=*/false,
    /*any_order=*/true,         check, kAttributes, attributes::repeats_alike, attributes::entry_alike,
    attributes::recall_alike};

}  // namespace hvd
