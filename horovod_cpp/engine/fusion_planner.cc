#include "horovod_cpp/engine/fusion_planner.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd {
namespace {

// What takes part in fusion: only what is of one class and together within the threshold may share a run.
template <typename Class>
struct Candidate {
  Class kind;
  std::size_t bytes;
  bool may_fuse;
};

// The numbers of the candidates that share a run, in the order of their first ones.
template <typename Class>
std::vector<std::vector<std::size_t>> share(const std::vector<Candidate<Class>>& candidates,
                                            const FusionLimits& limits) {
  struct Open {
    std::size_t run;
    std::size_t bytes;
  };
  std::vector<std::vector<std::size_t>> runs;
  std::vector<std::pair<Class, Open>> open;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const Candidate<Class>& one = candidates[i];
    const auto same =
        std::find_if(open.begin(), open.end(), [&](const auto& other) { return other.first == one.kind; });
    if (one.may_fuse && same != open.end() && same->second.bytes + one.bytes <= limits.threshold_bytes) {
      same->second.bytes += one.bytes;
      runs[same->second.run].push_back(i);
      continue;
    }
    // Alone, or the first of its class, or the run of its class is full: a new one begins here.
    const Open begun{runs.size(), one.bytes};
    runs.push_back({i});
    if (!one.may_fuse) continue;
    if (same != open.end()) {
      same->second = begun;
    } else {
      open.emplace_back(one.kind, begun);
    }
  }
  return runs;
}

// Calls that differ in none of these may be one.
auto fusion_class(const Response& response, const FusionLimits& limits) {
  const bool small = entry_bytes(response, response.entries.front()) <= limits.small_limit_bytes;
  return std::make_tuple(response.op, response.process_set, response.dtype, response.reduce_op, response.prescale,
                         response.postscale, response.memory, response.entries.front().devices, small);
}

}  // namespace

std::size_t entry_bytes(const Response& response, const ResponseEntry& entry) {
  std::size_t bytes = 0;
  for_each_tensor(response, entry, [&](DataType dtype, const Shape& shape) { bytes += bytes_of(dtype, shape); });
  return bytes;
}

bool may_fuse(const Response& response, const FusionLimits& limits) {
  // A group is a call of its own: its user has said what belongs together. Adasum looks at each tensor as a whole.
  return response.kind == Response::Kind::kExecute && limits.threshold_bytes > 0 &&
         find_op_rule(response.op)->fusible && response.reduce_op != ReduceOp::kAdasum &&
         response.entries.front().more.empty() &&
         entry_bytes(response, response.entries.front()) <= limits.copy_limit_bytes;
}

std::vector<Response> plan_fusion(std::vector<Response> agreed, const FusionLimits& limits) {
  std::vector<Candidate<decltype(fusion_class(agreed.front(), limits))>> candidates;
  for (const Response& response : agreed) {
    const bool fuses = may_fuse(response, limits);
    const std::size_t bytes = fuses ? entry_bytes(response, response.entries.front()) : 0;
    candidates.push_back({fusion_class(response, limits), bytes, fuses});
  }
  std::vector<Response> calls;
  for (const std::vector<std::size_t>& run : share(candidates, limits)) {
    calls.push_back(std::move(agreed[run.front()]));
    for (std::size_t i = 1; i < run.size(); ++i) {
      calls.back().entries.push_back(std::move(agreed[run[i]].entries.front()));
    }
  }
  return calls;
}

std::vector<std::vector<std::size_t>> plan_group(const std::vector<GroupMember>& members, const FusionLimits& limits) {
  std::vector<Candidate<std::pair<DataType, bool>>> candidates;
  for (const auto& [dtype, bytes] : members) {
    candidates.push_back({{dtype, bytes <= limits.small_limit_bytes},
                          bytes,
                          limits.threshold_bytes > 0 && bytes <= limits.copy_limit_bytes});
  }
  return share(candidates, limits);
}

}  // namespace hvd
