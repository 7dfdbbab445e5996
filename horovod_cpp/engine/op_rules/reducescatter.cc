#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& request, const Membership& /*membership*/) {
  HVD_RETURN_IF_ERROR(attributes::check_tensors(request));
  if (attributes::has_scalar(request)) {
    return Status::invalid_argument("Reducescatter does not support scalar inputs");
  }
  if (request.reduce_op != ReduceOp::kAverage && request.reduce_op != ReduceOp::kSum) {
    // As Horovod has it: not the caller's mistake, but something that is not there.
    return Status::internal(
        fmt::format("Reducescatter currently only supports AVERAGE and SUM. (got {})", name_of(request.reduce_op)));
  }
  return {};
}

}  // namespace

constinit const OpRule kReducescatterRule{OpKind::kReducescatter,
                                          /*fusible=*/false,
                                          /*cacheable=*/true,
                                          /*groupable=*/true,
                                          /*runs_with_joined=*/false,
                                          /*any_order=*/false,        check,
                                          attributes::kReduction,     attributes::repeats_alike,
                                          attributes::entry_alike,    attributes::recall_alike};

}  // namespace hvd
