#include "horovod_cpp/engine/stall_inspector.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "common/rank_text.h"

namespace hvd {

std::vector<OperationKey> StallInspector::look(const TensorQueue& queue, TimePoint now) {
  if (check_time_ <= Duration::zero() || now < nothing_due_until_) return {};
  if (const TimePoint next = next_look(queue); now < next) {
    nothing_due_until_ = std::min(next, now + check_time_);  // what is enqueued from now on is due later than that
    return {};
  }
  last_look_ = now;
  return queue.waiting_since_before(now - check_time_ + Duration(1));
}

TimePoint StallInspector::next_look(const TensorQueue& queue) const {
  if (check_time_ <= Duration::zero()) return kNever;
  const TimePoint oldest = queue.oldest();
  if (oldest == kNever) return kNever;
  const TimePoint due = oldest + check_time_;
  return last_look_ == TimePoint::min() ? due : std::max(due, last_look_ + check_time_);
}

std::string StallInspector::report(const std::vector<StallReportMessage::Line>& lines, Duration check_time) {
  std::map<std::vector<std::int64_t>, std::vector<const OperationKey*>> by_missing;
  std::vector<std::string> hints;  // each once
  for (const StallReportMessage::Line& line : lines) {
    by_missing[line.missing].push_back(&line.key);
    const bool is_new = std::find(hints.begin(), hints.end(), line.hint) == hints.end();
    if (!line.hint.empty() && is_new) hints.push_back(line.hint);
  }
  std::string text = fmt::format(
      "One or more tensors were submitted by a subset of ranks and wait for the others for more than {} s. "
      "This may indicate that ranks submit different tensors, or that one has stopped.",
      std::chrono::duration_cast<std::chrono::seconds>(check_time).count());
  for (const auto& [missing, keys] : by_missing) {
    const std::vector<int> ranks(missing.begin(), missing.end());
    text += fmt::format("\nMissing {}:", ranks.empty() ? "nobody (it runs now)" : rank_text(ranks));
    constexpr std::size_t shown = 6;
    for (std::size_t i = 0; i < std::min(shown, keys.size()); ++i) {
      text += fmt::format("{} {} '{}'", i > 0 ? "," : "", name_of(keys[i]->op), keys[i]->name);
      if (keys[i]->process_set != 0) text += fmt::format(" (process set {})", keys[i]->process_set);
    }
    if (keys.size() > shown) text += fmt::format(" and {} more", keys.size() - shown);
  }
  for (const std::string& hint : hints) text += fmt::format("\nPerhaps: {}", hint);
  return text;
}

}  // namespace hvd
