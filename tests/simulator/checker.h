// Holds the first broken invariant of a simulation. Whoever sees one reports it here; the run then stops between two
// events, since nothing may be thrown through the product.
#pragma once

#include <string>
#include <string_view>
#include <utility>

namespace hvd::simulator {

// The invariants, by the names that a failure prints (docs/simulator.md says what each means).
namespace invariant {
inline constexpr std::string_view kSameSequence = "same-sequence";
inline constexpr std::string_view kResolvesOnce = "resolves-once";
inline constexpr std::string_view kRightSum = "right-sum";
inline constexpr std::string_view kSameSum = "same-sum";
inline constexpr std::string_view kNoEndlessWait = "no-endless-wait";
inline constexpr std::string_view kErrorEverywhere = "error-everywhere";
inline constexpr std::string_view kIdleSilence = "idle-silence";
inline constexpr std::string_view kTransportContract = "transport-contract";
inline constexpr std::string_view kQuietMemory = "quiet-memory";
inline constexpr std::string_view kExpectedEnd = "expected-end";
inline constexpr std::string_view kFarewell = "farewell";
}  // namespace invariant

class Checker {
 public:
  bool broken() const { return !invariant_.empty(); }
  std::string_view invariant() const { return invariant_; }
  const std::string& text() const { return text_; }

  /// The first report stays.
  void report(std::string_view invariant, std::string text) {
    if (broken()) return;
    invariant_ = invariant;
    text_ = std::move(text);
  }

 private:
  std::string_view invariant_;
  std::string text_;
};

}  // namespace hvd::simulator
