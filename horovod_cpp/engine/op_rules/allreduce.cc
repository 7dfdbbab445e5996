#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& request, const Membership& /*membership*/) {
  HVD_RETURN_IF_ERROR(attributes::check_tensors(request));
  if (!is_valid(request.reduce_op)) {
    return Status::invalid_argument(
        fmt::format("reduction number {} is not known", static_cast<int>(request.reduce_op)));
  }
  if (request.reduce_op == ReduceOp::kAdasum) {
    Status checked;
    for_each_tensor(request, [&](DataType dtype, const Shape& /*shape*/) {
      if (is_floating_point(dtype)) return;
      checked = Status::invalid_argument(
          fmt::format("Adasum is for floating-point tensors, this one is of {}", name_of(dtype)));
    });
    return checked;
  }
  return {};
}

}  // namespace

constinit const OpRule kAllreduceRule{OpKind::kAllreduce,
                                      /*fusible=*/true,
                                      /*cacheable=*/true,
                                      /*groupable=*/true,
                                      /*runs_with_joined=*/true,
                                      /*any_order=*/true,        check,
                                      attributes::kReduction,    attributes::repeats_alike,
                                      attributes::entry_alike,   attributes::recall_alike};

}  // namespace hvd
