#include "horovod_cpp/engine/call_inspector.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/rank_text.h"

namespace hvd {
namespace {

// Others may not have begun a standing call yet: that is noticed after one check time, and the call is withdrawn then.
Duration patience(const CallInFlight& call, Duration limit, Duration check_time) {
  return is_standing_call(call.call) ? std::max(limit, 2 * check_time) : limit;
}

std::string operations(const CallInFlight& call) {
  std::string text = fmt::format("{} '{}'", name_of(call.op), call.name);
  if (call.process_set != 0) text += fmt::format(" (process set {})", call.process_set);
  if (call.count > 1) text += fmt::format(" and {} more", call.count - 1);
  if (call.on_device) text += ", which a GPU has not finished,";
  return text;
}

std::int64_t seconds_since(TimePoint begun, TimePoint now) {
  return std::chrono::duration_cast<std::chrono::seconds>(now - begun).count();
}

std::string awaited(const CallInFlight& call) {
  return call.awaited.empty() ? std::string() : fmt::format(", for {}", rank_text(call.awaited));
}

}  // namespace

TimePoint CallInspector::next_look(const Executor& executor) const {
  const TimePoint oldest = executor.oldest_call();
  if (oldest == kNever) return kNever;
  TimePoint due = kNever;
  if (check_time_ > Duration::zero()) {
    due = oldest + check_time_ + Duration(1);
    if (last_report_ != TimePoint::min()) due = std::max(due, last_report_ + check_time_);
  }
  if (most_time_ > Duration::zero()) due = std::min(due, oldest + most_time_ + Duration(1));
  return due == kNever ? kNever : std::max(due, nothing_due_until_);
}

CallInspector::Found CallInspector::look(const Executor& executor, TimePoint now) {
  Found found;
  if (now < nothing_due_until_) return found;
  // What begins from now on is due later than this.
  Duration shortest = Duration::max();
  for (const Duration limit : {check_time_, most_time_}) {
    if (limit > Duration::zero()) shortest = std::min(shortest, limit);
  }
  if (shortest == Duration::max()) {
    nothing_due_until_ = kNever;
    return found;
  }
  const TimePoint next = next_look(executor);
  if (now < next) {
    nothing_due_until_ = std::min(next, now + shortest);
    return found;
  }
  const auto begun_before = [&](Duration limit) {
    std::vector<CallInFlight> calls = executor.calls_begun_before(now - limit);
    std::erase_if(calls,
                  [&](const CallInFlight& call) { return now - call.begun <= patience(call, limit, check_time_); });
    return calls;
  };
  if (most_time_ > Duration::zero()) found.late = begun_before(most_time_);
  const bool may_report =
      check_time_ > Duration::zero() && (last_report_ == TimePoint::min() || now - last_report_ >= check_time_);
  if (may_report) found.slow = begun_before(check_time_);
  if (!found.slow.empty()) last_report_ = now;
  constexpr Duration again = std::chrono::milliseconds(100);  // where what is due has more patience
  nothing_due_until_ = now + std::min(shortest, again);
  return found;
}

std::string CallInspector::report(const std::vector<CallInFlight>& slow, TimePoint now) {
  std::string text = "Calls have begun and do not end. A rank may have stopped, or the network.";
  constexpr std::size_t shown = 6;
  for (std::size_t i = 0; i < std::min(shown, slow.size()); ++i) {
    text += fmt::format("\nThis rank waits in {} for {} s{}", operations(slow[i]), seconds_since(slow[i].begun, now),
                        awaited(slow[i]));
  }
  if (slow.size() > shown) text += fmt::format("\nand in {} more", slow.size() - shown);
  return text;
}

std::string CallInspector::late_text(const CallInFlight& call, TimePoint now) {
  return fmt::format("{} has begun and not ended within HOROVOD_STALL_SHUTDOWN_TIME_SECONDS; a rank waited for {} s{}",
                     operations(call), seconds_since(call.begun, now), awaited(call));
}

}  // namespace hvd
