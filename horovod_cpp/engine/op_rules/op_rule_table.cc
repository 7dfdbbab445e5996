#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

constexpr std::array<const OpRule*, 9> kRules{&kAllreduceRule,     &kAllgatherRule,     &kBroadcastRule,
                                              &kBarrierRule,       &kProcessSetAddRule, &kProcessSetRemoveRule,
                                              &kReducescatterRule, &kAlltoallRule,      &kJoinRule};

}  // namespace

const OpRule* find_op_rule(OpKind op) {
  const auto index = static_cast<std::size_t>(op);
  return index < kRules.size() ? kRules[index] : nullptr;
}

}  // namespace hvd
