#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

constexpr std::array kAttributes{Attribute{"number of tensors", attributes::tensors},
                                 Attribute{"data type", attributes::dtype},
                                 Attribute{"shape", attributes::shape},
                                 Attribute{"reduction", attributes::reduce_op},
                                 Attribute{"prescale factor", attributes::prescale},
                                 Attribute{"postscale factor", attributes::postscale},
                                 Attribute{"memory", attributes::memory}};

Status check(const Request& request, const Membership& /*membership*/) {
  HVD_RETURN_IF_ERROR(attributes::check_tensors(request));
  if (!is_valid(request.reduce_op)) {
    return Status::invalid_argument(
        fmt::format("reduction number {} is not known", static_cast<int>(request.reduce_op)));
  }
  if (request.reduce_op == ReduceOp::kAdasum) {
    for (const TensorType& tensor : tensors_of(request)) {
      if (is_floating_point(tensor.dtype)) continue;
      return Status::invalid_argument(
          fmt::format("Adasum is for floating-point tensors, this one is of {}", name_of(tensor.dtype)));
    }
  }
  return {};
}

}  // namespace

constinit const OpRule kAllreduceRule{
    OpKind::kAllreduce,
    /*fusible=*/true,
    /*cacheable=*/true,
    /*groupable=*/true,
    /*runs_with_joined=*/true, check, kAttributes, attributes::repeats_alike, attributes::entry_alike,
    attributes::recall_alike};

}  // namespace hvd
