// What happened, as a hash of everything and the last lines as text. Two runs of one seed have one hash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/clock.h"

namespace hvd::simulator {

class Trace {
 public:
  enum class What : std::uint8_t {
    kStep,
    kEnqueue,
    kRefused,
    kResolved,
    kPost,
    kControl,
    kSend,
    kReceive,
    kPiece,
    kCancel,
    kGoodbye,
    kPeerLost,
    kDeath,
    kShutdown,
    kFinished,
  };

  explicit Trace(const Clock& clock) : clock_(clock), last_(kKept) {}
  /// Prints every line as it comes.
  void print_all() { prints_ = true; }

  void note(What what, int rank, int peer, std::uint64_t a, std::uint64_t b);
  /// Bytes count for the hash alone.
  void note_bytes(std::span<const std::byte> bytes);

  std::uint64_t hash() const { return hash_; }
  std::string last_lines() const;

 private:
  struct Line {
    TimePoint when;
    What what = What::kStep;
    int rank = -1;
    int peer = -1;
    std::uint64_t a = 0;
    std::uint64_t b = 0;
  };
  static constexpr std::size_t kKept = 48;

  static std::string text(const Line& line);

  const Clock& clock_;
  std::uint64_t hash_ = 0;
  std::uint64_t count_ = 0;
  std::vector<Line> last_;  // a ring: `count_` modulo its size is the oldest
  bool prints_ = false;
};

}  // namespace hvd::simulator
