#include "tests/simulator/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>

#include "tests/simulator/random.h"

namespace hvd::simulator {
namespace {

// How a line reads, in the order of Trace::What; the numbers behind a peer are `a` and `b`.
constexpr std::array<std::string_view, 15> kNames{"step",
                                                  "enqueue #",
                                                  "refused #",
                                                  "resolved # (code)",
                                                  "post to (bytes)",
                                                  "control from (bytes)",
                                                  "send to (key, bytes)",
                                                  "receive from (key, bytes)",
                                                  "piece from (key, bytes)",
                                                  "cancel with (key)",
                                                  "goodbye from",
                                                  "peer lost:",
                                                  "dies",
                                                  "wants shutdown",
                                                  "finished"};

}  // namespace

void Trace::note(What what, int rank, int peer, std::uint64_t a, std::uint64_t b) {
  const Line line{clock_.now(), what, rank, peer, a, b};
  const auto time = static_cast<std::uint64_t>(line.when.time_since_epoch().count());
  const std::uint64_t who = static_cast<std::uint64_t>(rank) << 40 ^ static_cast<std::uint64_t>(peer) << 16 ^
                            static_cast<std::uint64_t>(what);
  hash_ = Random::mix(hash_ ^ time);
  hash_ = Random::mix(hash_ ^ who);
  hash_ = Random::mix(hash_ ^ a ^ (b << 32 | b >> 32));
  last_[count_++ % kKept] = line;
  if (prints_) std::printf("%s\n", text(line).c_str());
}

void Trace::note_bytes(std::span<const std::byte> bytes) {
  std::uint64_t word = bytes.size();
  for (; bytes.size() >= sizeof(word); bytes = bytes.subspan(sizeof(word))) {
    std::uint64_t next = 0;
    std::memcpy(&next, bytes.data(), sizeof(next));
    word = Random::mix(word ^ next);
  }
  for (const std::byte byte : bytes) word = word * 257 + static_cast<std::uint64_t>(byte);
  hash_ = Random::mix(hash_ ^ word);
}

std::string Trace::text(const Line& line) {
  const auto nanoseconds = line.when.time_since_epoch().count() - 1'000'000'000;
  std::string text = fmt::format("{:>13.3f} us  rank {} {}", static_cast<double>(nanoseconds) / 1000.0, line.rank,
                                 kNames[static_cast<std::size_t>(line.what)]);
  if (line.peer >= 0) text += fmt::format(" {}", line.peer);
  if (line.a != 0 || line.b != 0) text += fmt::format(" [{:#x} {}]", line.a, line.b);
  return text;
}

std::string Trace::last_lines() const {
  std::string lines;
  for (std::uint64_t i = count_ - std::min<std::uint64_t>(count_, kKept); i < count_; ++i) {
    lines += "  " + text(last_[i % kKept]) + "\n";
  }
  return lines;
}

}  // namespace hvd::simulator
