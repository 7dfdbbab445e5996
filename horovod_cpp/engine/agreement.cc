#include "horovod_cpp/engine/agreement.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "common/rank_text.h"

namespace hvd {
namespace {

struct Said {
  int set_rank;
  Request request;
};

// The requests of all set ranks, in their order, less those that have joined and asked for nothing; those that came as
// a cache id are recalled.
std::vector<Said> requests_by_rank(const ReadinessTable::Pending& pending, const ResponseCache& cache) {
  std::vector<Said> requests;
  for (const auto& [set_rank, request] : pending.full) requests.push_back({set_rank, request});
  for (const auto& [id, set_ranks] : pending.cached) {
    const ResponseCache::Entry& known = *cache.find(id);
    const OpRule& rule = *find_op_rule(known.agreed.key.op);
    for (const int set_rank : set_ranks) {
      requests.push_back({set_rank, rule.recall(known.agreed, known.entry, set_rank)});
      requests.back().request.device = device_of(known.entry, set_rank);
    }
  }
  std::sort(requests.begin(), requests.end(), [](const Said& a, const Said& b) { return a.set_rank < b.set_rank; });
  return requests;
}

// "float32: ranks 0-2 (train.py:88)": a value, who said it, and where in their programs.
std::string value_text(const std::string& value, const std::vector<int>& ranks, const std::set<std::string>& sites) {
  std::string text = fmt::format("{}: {}", value, rank_text(ranks));
  if (!sites.empty()) text += fmt::format(" ({})", fmt::join(sites, ", "));
  return text;
}

struct Values {
  struct Value {
    std::string value;
    std::vector<int> ranks;
    std::set<std::string> sites;
  };
  std::vector<Value> said;  // in the order of the ranks that said it first

  void add(std::string value, int rank, const std::string& site) {
    auto place = std::find_if(said.begin(), said.end(), [&](const Value& one) { return one.value == value; });
    if (place == said.end()) place = said.insert(said.end(), {std::move(value), {}, {}});
    place->ranks.push_back(rank);
    if (!site.empty()) place->sites.insert(site);
  }
};

// Empty when all ranks agree.
std::string disagreements(std::span<const Attribute> attributes, const std::vector<Said>& requests,
                          const Membership& membership, const CallSiteText& call_site) {
  std::string text;
  for (const Attribute& attribute : attributes) {
    const std::string first = attribute.text(requests.front().request);
    const bool alike = std::all_of(requests.begin() + 1, requests.end(),
                                   [&](const Said& said) { return attribute.text(said.request) == first; });
    if (alike) continue;
    Values values;
    for (const Said& said : requests) {
      const int rank = membership.ranks[static_cast<std::size_t>(said.set_rank)];
      values.add(attribute.text(said.request), rank, call_site(rank, said.request.call_site));
    }
    text += fmt::format("{}mismatched {}:", text.empty() ? "" : "; ", attribute.name);
    for (const Values::Value& said : values.said) {
      text += fmt::format("{} {}", &said == &values.said.front() ? "" : ";",
                          value_text(said.value, said.ranks, said.sites));
    }
  }
  return text;
}

}  // namespace

Response error_response(const OperationKey& key, StatusCode code, std::string text) {
  Response response;
  response.kind = Response::Kind::kError;
  response.op = key.op;
  response.process_set = key.process_set;
  response.entries.emplace_back().name = key.name;
  response.error_code = code;
  response.error = std::move(text);
  return response;
}

Agreement agree(const OperationKey& key, const ReadinessTable::Pending& pending, const ResponseCache& cache,
                const CallSiteText& call_site) {
  Agreement agreement;
  Response& response = agreement.response;
  ResponseEntry entry;
  if (pending.full.empty() && pending.cached.size() == 1) {
    const ResponseCache::Entry& known = *cache.find(pending.cached.front().first);
    agreement.repeated = known.id;
    agreement.agreed = known.agreed;
    entry = known.entry;
  } else {
    const std::vector<Said> requests = requests_by_rank(pending, cache);
    const OpRule& rule = *find_op_rule(key.op);
    const std::string differences = disagreements(rule.attributes, requests, *pending.membership, call_site);
    if (!differences.empty()) {
      response = error_response(key, StatusCode::kInvalidArgument,
                                fmt::format("{} '{}': {}", name_of(key.op), key.name, differences));
      return agreement;
    }
    const std::string_view refusal = rule.refusal != nullptr ? rule.refusal(requests.front().request) : "";
    if (!refusal.empty()) {
      response = error_response(key, StatusCode::kInvalidArgument,
                                fmt::format("{} '{}': {}", name_of(key.op), key.name, refusal));
      return agreement;
    }
    std::vector<const Request*> pointers;
    for (const Said& said : requests) pointers.push_back(&said.request);
    agreement.agreed = requests.front().request;
    entry = rule.entry(pointers);
    // What is remembered, and compared with later requests, is the order that the call takes.
    agreement.agreed.order = entry.order;
    agreement.agreed.more = entry.more;
    if (agreement.agreed.memory != MemoryKind::kHost) {
      entry.devices.assign(static_cast<std::size_t>(pending.membership->size()), -1);
      for (const Said& said : requests) entry.devices[static_cast<std::size_t>(said.set_rank)] = said.request.device;
    }
  }
  const Request& agreed = agreement.agreed;
  response.op = key.op;
  response.process_set = key.process_set;
  response.dtype = agreed.dtype;
  response.reduce_op = agreed.reduce_op;
  response.prescale = agreed.prescale;
  response.postscale = agreed.postscale;
  response.root_rank = agreed.root_rank;
  response.memory = agreed.memory;
  response.entries.push_back(std::move(entry));
  return agreement;
}

}  // namespace hvd
