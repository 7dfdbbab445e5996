#include "tests/support/access_checker.h"

#include <algorithm>

#include <fmt/format.h>

namespace hvd::testing {
namespace {

std::uintptr_t begin_of(const ByteRange& range) { return reinterpret_cast<std::uintptr_t>(range.begin); }
std::uintptr_t end_of(const ByteRange& range) { return begin_of(range) + range.bytes; }

bool covers(const ByteRange& outer, const ByteRange& inner) {
  return begin_of(outer) <= begin_of(inner) && end_of(inner) <= end_of(outer);
}

}  // namespace

bool overlap(const ByteRange& a, const ByteRange& b) { return begin_of(a) < end_of(b) && begin_of(b) < end_of(a); }

void join(VectorClock& into, const VectorClock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (std::size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void AccessChecker::add(const void* memory, std::size_t bytes) {
  const ByteRange range{memory, bytes};
  const auto next = blocks_.lower_bound(begin_of(range));
  const bool hits_next = next != blocks_.end() && next->first < end_of(range);
  const bool hits_previous =
      next != blocks_.begin() && std::prev(next)->first + std::prev(next)->second.bytes > begin_of(range);
  if (hits_next || hits_previous) {
    violations_.push_back(fmt::format("memory {} of {} bytes is added while it is there", memory, bytes));
    return;
  }
  blocks_[begin_of(range)] = {bytes, ++last_id_};
}

std::size_t AccessChecker::remove(const void* memory) {
  const auto block = blocks_.find(reinterpret_cast<std::uintptr_t>(memory));
  if (block == blocks_.end()) {
    violations_.push_back(fmt::format("memory {} is freed or forgotten, but was never there or is gone", memory));
    return 0;
  }
  const ByteRange range{memory, block->second.bytes};
  blocks_.erase(block);
  std::erase_if(history_, [&range](const Access& access) { return overlap(access.range, range); });
  return range.bytes;
}

AccessChecker::BlockId AccessChecker::find(const ByteRange& range) const {
  auto block = blocks_.upper_bound(begin_of(range));
  if (block == blocks_.begin()) return 0;
  --block;
  return end_of(range) <= block->first + block->second.bytes ? block->second.id : 0;
}

void AccessChecker::access(std::size_t stream, const VectorClock& clock, const std::string& work,
                           const std::vector<ByteRange>& reads, const std::vector<ByteRange>& writes) {
  for (const ByteRange& range : reads) note({range, /*writes=*/false, stream, clock[stream], work}, clock);
  for (const ByteRange& range : writes) note({range, /*writes=*/true, stream, clock[stream], work}, clock);
}

void AccessChecker::note(Access access, const VectorClock& clock) {
  const auto ordered = [&](const Access& earlier) {
    return earlier.stream == access.stream || (earlier.stream < clock.size() && clock[earlier.stream] >= earlier.tick);
  };
  for (const Access& earlier : history_) {
    if (!(earlier.writes || access.writes) || ordered(earlier) || !overlap(earlier.range, access.range)) continue;
    violations_.push_back(fmt::format("unordered: '{}' on stream {} {} {} bytes at {} that '{}' on stream {} {}",
                                      access.work, access.stream, access.writes ? "writes" : "reads",
                                      access.range.bytes, access.range.begin, earlier.work, earlier.stream,
                                      earlier.writes ? "writes" : "reads"));
  }
  // What is ordered after this access is ordered after those that it covers.
  std::erase_if(history_, [&](const Access& earlier) {
    return (access.writes || !earlier.writes) && covers(access.range, earlier.range) && ordered(earlier);
  });
  history_.push_back(std::move(access));
}

}  // namespace hvd::testing
