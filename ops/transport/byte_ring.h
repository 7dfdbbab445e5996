// A ring of bytes in memory that two threads or two processes share: one writes, one reads, nobody waits.
// The control block holds only lock-free atomics, so it may lie in shared memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace hvd {

/// Positions count bytes since the start of the stream. Sequentially consistent stores and loads throughout: a
/// rank that says "I sleep" and then looks, and a peer that publishes and then looks for sleepers, cannot miss
/// each other.
struct ByteRingControl {
  alignas(64) std::atomic<std::uint64_t> written{0};
  alignas(64) std::atomic<std::uint64_t> consumed{0};
  alignas(64) std::atomic<std::uint32_t> writer_blocked{0};  // the writer found no room
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// Position 0 lies so far into the memory: behind a header of 48 bytes a payload then starts a cache line, and no store
/// of a copy meets two of them (a fifth of the speed of large copies).
inline constexpr std::size_t kRingShiftBytes = 16;

class ByteRingWriter {
 public:
  /// `memory` has a power of two of bytes.
  ByteRingWriter(ByteRingControl& control, std::span<std::byte> memory) : control_(control), memory_(memory) {}

  std::size_t write_some(std::span<const std::byte> bytes) {
    std::size_t room = memory_.size() - static_cast<std::size_t>(written_ - consumed_seen_);
    if (room < bytes.size()) room = look_for_room(bytes.size());
    const std::size_t count = std::min(room, bytes.size());
    if (count == 0) return 0;
    if (blocked_ && count == bytes.size()) {
      blocked_ = false;
      control_.writer_blocked.store(0);
    }
    const std::size_t start = static_cast<std::size_t>(written_ + kRingShiftBytes) & (memory_.size() - 1);
    const std::size_t first = std::min(count, memory_.size() - start);
    std::memcpy(memory_.data() + start, bytes.data(), first);
    if (count > first) std::memcpy(memory_.data(), bytes.data() + first, count - first);
    written_ += count;
    control_.written.store(written_);
    return count;
  }

  bool has_room() {
    consumed_seen_ = control_.consumed.load();
    return written_ - consumed_seen_ < memory_.size();
  }
  /// The reader has read everything: it need not be told of it.
  bool all_read() const { return control_.consumed.load() == written_; }
  /// What was to be written last did not fit.
  bool blocked() const { return blocked_; }

 private:
  std::size_t look_for_room(std::size_t wanted) {
    consumed_seen_ = control_.consumed.load();
    const std::size_t room = memory_.size() - static_cast<std::size_t>(written_ - consumed_seen_);
    if (room >= wanted) return room;
    blocked_ = true;
    control_.writer_blocked.store(1);
    consumed_seen_ = control_.consumed.load();
    return memory_.size() - static_cast<std::size_t>(written_ - consumed_seen_);
  }

  ByteRingControl& control_;
  std::span<std::byte> memory_;
  std::uint64_t written_ = 0;
  std::uint64_t consumed_seen_ = 0;
  bool blocked_ = false;
};

class ByteRingReader {
 public:
  ByteRingReader(ByteRingControl& control, std::span<const std::byte> memory) : control_(control), memory_(memory) {}

  /// Contiguous bytes that have arrived. A peer that writes nonsense positions gets an empty span.
  std::span<const std::byte> peek() {
    const std::uint64_t available = control_.written.load() - consumed_;
    if (available == 0 || available > memory_.size()) return {};
    const std::size_t start = static_cast<std::size_t>(consumed_ + kRingShiftBytes) & (memory_.size() - 1);
    return memory_.subspan(start, std::min<std::size_t>(available, memory_.size() - start));
  }
  void consume(std::size_t count) {
    consumed_ += count;
    control_.consumed.store(consumed_);
  }
  bool writer_is_blocked() const { return control_.writer_blocked.load() != 0; }

 private:
  ByteRingControl& control_;
  std::span<const std::byte> memory_;
  std::uint64_t consumed_ = 0;
};

}  // namespace hvd
