#include "common/fault.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>
#include <csignal>
#include <optional>
#include <string>
#include <utility>

namespace hvd {
namespace {

constexpr std::array<std::string_view, kFaultPoints> kPointNames{
    "control_send", "control_receive", "segment_send", "segment_receive", "goodbye_send", "offer_send", "taken_send"};
constexpr std::array<std::string_view, 7> kActNames{"kill", "stop", "exit", "drop", "corrupt", "fail", "slow"};

template <std::size_t N>
std::optional<std::size_t> index_in(const std::array<std::string_view, N>& names, std::string_view name) {
  for (std::size_t i = 0; i < N; ++i) {
    if (names[i] == name) return i;
  }
  return std::nullopt;
}

std::optional<std::uint64_t> whole_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Splits at the first `separator`; the second part is empty when there is none.
std::pair<std::string_view, std::string_view> split(std::string_view text, char separator) {
  const std::size_t place = text.find(separator);
  if (place == std::string_view::npos) return {text, {}};
  return {text.substr(0, place), text.substr(place + 1)};
}

// Goes behind "it has to be".
Status refusal(std::string_view part, std::string_view why = {}) {
  return Status::invalid_argument(fmt::format(
      "a list of faults action@point#n[:rank=r], with an action of {}, a point of {}, and n from 1; '{}' is none{}{}",
      fmt::join(kActNames, ", "), fmt::join(kPointNames, ", "), part, why.empty() ? "" : ": ", why));
}

}  // namespace

Result<FaultPlan::Rule> FaultPlan::parse_rule(std::string_view text) {
  const auto [what, condition] = split(text, ':');
  const auto [act_name, where] = split(what, '@');
  const auto [point_name, passage_text] = split(where, '#');
  const auto act = index_in(kActNames, act_name);
  const auto point = index_in(kPointNames, point_name);
  const auto passage = passage_text.empty() ? std::optional<std::uint64_t>(1) : whole_number(passage_text);
  if (!act || !point || !passage || *passage == 0) return refusal(text);
  Rule rule{static_cast<Act>(*act), static_cast<FaultPoint>(*point), *passage, std::nullopt};
  if (!condition.empty()) {
    const auto [key, value] = split(condition, '=');
    rule.rank = whole_number(value);
    if (key != "rank" || !rule.rank) return refusal(text);
  }
  const bool at_segment = rule.point == FaultPoint::kSegmentSend || rule.point == FaultPoint::kSegmentReceive;
  if (rule.act == Act::kCorrupt && at_segment) return refusal(text, "a segment has no checksum that could find it");
  if (rule.act == Act::kSlow && (rule.point != FaultPoint::kSegmentSend || passage_text.empty())) {
    return refusal(text, "write slow@segment_send#n, with n bytes a second");
  }
  return rule;
}

Result<std::unique_ptr<FaultPlan>> FaultPlan::parse(std::string_view text, int rank) {
  auto plan = std::make_unique<FaultPlan>();
  while (!text.empty()) {
    const auto [part, rest] = split(text, ',');
    text = rest;
    Result<Rule> rule = parse_rule(part);
    if (!rule) return rule.status();
    if (rule->act == Act::kSlow) plan->slows_any_ = true;
    if (rule->rank && *rule->rank != static_cast<std::uint64_t>(rank)) continue;
    if (rule->act == Act::kSlow) {
      plan->bytes_per_second_ = rule->passage;
    } else {
      plan->rules_.push_back(*rule);
    }
  }
  return plan;
}

FaultAction FaultPlan::at(FaultPoint point, int /*peer*/) {
  const std::uint64_t passage = ++passages_[static_cast<std::size_t>(point)];
  for (const Rule& rule : rules_) {
    if (rule.point != point || rule.passage != passage) continue;
    switch (rule.act) {
      case Act::kKill:
        ::raise(SIGKILL);
        break;
      case Act::kStop:
        ::raise(SIGSTOP);
        break;
      case Act::kExit:
        ::_exit(0);
      case Act::kDrop:
        return FaultAction::kDrop;
      case Act::kCorrupt:
        return FaultAction::kCorrupt;
      case Act::kFail:
        return FaultAction::kFail;
      case Act::kSlow:  // a property of the transports, not of a passage
        break;
    }
  }
  return FaultAction::kPass;
}

}  // namespace hvd
