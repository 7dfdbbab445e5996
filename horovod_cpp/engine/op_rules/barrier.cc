#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& /*request*/, const Membership& /*membership*/) { return {}; }

}  // namespace

constinit const OpRule kBarrierRule{
    OpKind::kBarrier,
    /*fusible=*/false,
    /*cacheable=*/true,
    /*groupable=*/false,
    /*runs_with_joined=*/true,
    /*any_order=*/false,       check, {}, attributes::repeats_alike, attributes::entry_alike, attributes::recall_alike};

}  // namespace hvd
