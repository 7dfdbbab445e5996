// The rule of each operation, one file each; op_rule_table.cc lists them.
#pragma once

#include <array>

#include "horovod_cpp/engine/op_rules/attributes.h"
#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd {

extern const OpRule kAllreduceRule;
extern const OpRule kAllgatherRule;
extern const OpRule kBroadcastRule;
extern const OpRule kBarrierRule;
extern const OpRule kProcessSetAddRule;
extern const OpRule kProcessSetRemoveRule;
extern const OpRule kReducescatterRule;
extern const OpRule kAlltoallRule;
extern const OpRule kJoinRule;

}  // namespace hvd
