// The one fault hook: every point where a message or a segment passes asks it. Always compiled, off by default.
// Called under the Turn of the rank that it belongs to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include <horovod_cpp/status.h>

namespace hvd {

enum class FaultPoint : std::uint8_t {
  kControlSend,
  kControlReceive,
  kSegmentSend,
  kSegmentReceive,
  // What byte streams say between messages: the farewell, "lies there for you to pull", and its answer.
  kGoodbyeSend,
  kOfferSend,
  kTakenSend,
};
inline constexpr std::size_t kFaultPoints = 7;

enum class FaultAction : std::uint8_t {
  kPass,     ///< nothing happens
  kDrop,     ///< the message vanishes; a transfer stays pending until it is cancelled
  kCorrupt,  ///< one bit of a message flips on its way: its receiver loses the sender. Not of a segment
  kFail,     ///< a transfer ends with an error; a message vanishes
};

class FaultHook {
 public:
  virtual ~FaultHook() = default;
  virtual FaultAction at(FaultPoint point, int peer) = 0;
};

/// Faults from a text such as "kill@segment_send#17:rank=3,drop@control_receive#2": an action at the n-th passage
/// (counted from 1) of a point, on one rank or on all. Actions: kill, stop, exit (of this process) and drop,
/// corrupt, fail. Segments have no checksum, so a bit that flips there is seen by nobody: corrupt takes other points.
/// "slow@segment_send#n" is no event: the rank sends at most n bytes of data a second.
class FaultPlan final : public FaultHook {
 public:
  /// The plan of `rank`. All of `text` is read, also what is for other ranks, so that all of them refuse the same.
  /// kInvalidArgument says what it has to be, and which part is not.
  static Result<std::unique_ptr<FaultPlan>> parse(std::string_view text, int rank);

  FaultAction at(FaultPoint point, int peer) override;
  bool empty() const { return rules_.empty(); }
  /// Some rank is slow, this one or another.
  bool slows_any() const { return slows_any_; }
  /// Of "slow": for who builds the transports, `at` knows nothing of it.
  std::optional<std::uint64_t> bytes_per_second() const { return bytes_per_second_; }

 private:
  enum class Act : std::uint8_t { kKill, kStop, kExit, kDrop, kCorrupt, kFail, kSlow };
  struct Rule {
    Act act;
    FaultPoint point;
    std::uint64_t passage;
    std::optional<std::uint64_t> rank;  // nothing: all
  };

  static Result<Rule> parse_rule(std::string_view text);

  std::vector<Rule> rules_;
  std::array<std::uint64_t, kFaultPoints> passages_{};
  bool slows_any_ = false;
  std::optional<std::uint64_t> bytes_per_second_;
};

}  // namespace hvd
