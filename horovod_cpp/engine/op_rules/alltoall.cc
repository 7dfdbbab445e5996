#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& request, const Membership& membership) {
  HVD_RETURN_IF_ERROR(attributes::check_tensors(request));
  if (attributes::has_scalar(request)) {
    return Status::invalid_argument("a scalar cannot be split; give it one dimension, as in tensor.reshape(1)");
  }
  const std::int64_t rows = request.shape.front();
  const std::vector<std::int64_t>& splits = request.splits;
  if (!request.has_splits) {
    if (rows % membership.size() == 0) return {};
    return Status::invalid_argument(
        fmt::format("splits not provided, but first dimension of tensor is not an even multiple of the number of "
                    "workers. ({} rows, {} ranks)",
                    rows, membership.size()));
  }
  if (splits.size() != static_cast<std::size_t>(membership.size())) {
    return Status::invalid_argument(
        fmt::format("Number of entries in splits does not equal number of workers. ({} entries, {} ranks)",
                    splits.size(), membership.size()));
  }
  std::int64_t left = rows;
  for (const std::int64_t split : splits) {
    if (split < 0) return Status::invalid_argument(fmt::format("splits {} has a negative entry", shape_text(splits)));
    if (split > left) {
      return Status::invalid_argument(
          fmt::format("Sum of splits entries is greater than the first dimension of tensor. (splits {}, {} rows)",
                      shape_text(splits), rows));
    }
    left -= split;
  }
  return {};
}

// How many rows go where does not count: ranks tell it each other with the data. So a call with other splits is the
// same agreement.
bool repeats(const Request& request, const Request& agreed, const ResponseEntry& /*entry*/, int /*index*/) {
  if (request.shape.size() != agreed.shape.size()) return false;
  Request alike = request;
  alike.shape.front() = agreed.shape.front();
  return attributes::same_agreement(alike, agreed);
}

}  // namespace

constinit const OpRule kAlltoallRule{
    OpKind::kAlltoall,
    /*fusible=*/false,
    /*cacheable=*/true,
    /*groupable=*/false,
    /*runs_with_joined=*/false,
    /*any_order=*/false,        check, attributes::kRows, repeats, attributes::entry_alike, attributes::recall_alike};

}  // namespace hvd
