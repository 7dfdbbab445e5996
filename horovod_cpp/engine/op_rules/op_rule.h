// What an operation means in negotiation, as data: what is checked at the call, what ranks must agree on, whether it
// may be fused and remembered. Controller, fusion and cache ask the rule and have no branches on operations.
// Pure; any thread.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "horovod_cpp/engine/request_response.h"
#include "ops/membership.h"

namespace hvd {

/// Something that every rank must say alike, with its value as people read it.
struct Attribute {
  std::string_view name;
  std::string (*text)(const Request& request);
};

struct OpRule {
  OpKind op;
  bool fusible;
  bool cacheable;
  bool groupable;         ///< several tensors may be one operation
  bool runs_with_joined;  ///< ranks that have joined take part, with tensors that change nothing
  bool any_order;         ///< works on the memory of a tensor as a whole, in whatever order all ranks have it
  /// What the calling rank can know by itself. Texts do not repeat operation and tensor name.
  Status (*check)(const Request& request, const Membership& membership);
  /// What ranks must agree on.
  std::span<const Attribute> attributes;
  /// True when `request` of set rank `index` is what the remembered entry says; then a cache id stands for it.
  bool (*repeats)(const Request& request, const Request& agreed, const ResponseEntry& entry, int index);
  /// The entry of agreed requests, in the order of the set's ranks; those of joined ranks are not among them.
  ResponseEntry (*entry)(std::span<const Request* const> requests);
  /// A request as rank `index` must have sent it when it sent the cache id of `entry`. What does not count for the
  /// agreement may differ.
  Request (*recall)(const Request& agreed, const ResponseEntry& entry, int index);
  /// Why what all ranks have asked for alike cannot be carried out, as an error on all of them; empty if it can be.
  std::string_view (*refusal)(const Request& agreed) = nullptr;
};

/// The rule of `op`; nullptr for a number that names no operation.
const OpRule* find_op_rule(OpKind op);

}  // namespace hvd
