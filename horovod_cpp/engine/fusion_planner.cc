#include "horovod_cpp/engine/fusion_planner.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd {
namespace {

// Calls that differ in none of these may be one.
auto fusion_class(const Response& response, const FusionLimits& limits) {
  const bool small = entry_bytes(response, response.entries.front()) <= limits.small_limit_bytes;
  return std::make_tuple(response.op, response.process_set, response.dtype, response.reduce_op, response.prescale,
                         response.postscale, small);
}

struct Open {
  std::size_t index;  // of the call in the result
  std::size_t bytes;
};

}  // namespace

std::size_t entry_bytes(const Response& response, const ResponseEntry& entry) {
  const Result<std::int64_t> count = element_count(entry.shape);
  return count.ok() ? static_cast<std::size_t>(count.value()) * size_of(response.dtype) : 0;
}

bool may_fuse(const Response& response, const FusionLimits& limits) {
  return response.kind == Response::Kind::kExecute && limits.threshold_bytes > 0 &&
         find_op_rule(response.op)->fusible &&
         entry_bytes(response, response.entries.front()) <= limits.copy_limit_bytes;
}

std::vector<Response> plan_fusion(std::vector<Response> agreed, const FusionLimits& limits) {
  std::vector<Response> calls;
  using Class = decltype(fusion_class(agreed.front(), limits));
  std::vector<std::pair<Class, Open>> open;
  for (Response& response : agreed) {
    if (!may_fuse(response, limits)) {
      calls.push_back(std::move(response));
      continue;
    }
    const Class wanted = fusion_class(response, limits);
    const std::size_t bytes = entry_bytes(response, response.entries.front());
    const auto same_class =
        std::find_if(open.begin(), open.end(), [&](const auto& one) { return one.first == wanted; });
    if (same_class != open.end() && same_class->second.bytes + bytes <= limits.threshold_bytes) {
      same_class->second.bytes += bytes;
      calls[same_class->second.index].entries.push_back(std::move(response.entries.front()));
      continue;
    }
    // The first of its class, or the call of its class is full: the next one begins here.
    const Open begun{calls.size(), bytes};
    if (same_class != open.end()) {
      same_class->second = begun;
    } else {
      open.emplace_back(wanted, begun);
    }
    calls.push_back(std::move(response));
  }
  return calls;
}

}  // namespace hvd
