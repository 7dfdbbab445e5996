#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& request, const Membership& /*membership*/) {
  if (request.key.process_set == 0) return {};
  return Status::invalid_argument("join is a matter of all ranks: it has no process set");
}

}  // namespace

constinit const OpRule kJoinRule{OpKind::kJoin,
                                 /*fusible=*/false,
                                 /*cacheable=*/false,
                                 /*groupable=*/false,
                                 /*runs_with_joined=*/false,
                                 /*any_order=*/false,
                                 check,
                                 {},
                                 attributes::repeats_alike,
                                 attributes::entry_alike,
                                 attributes::recall_alike};

}  // namespace hvd
