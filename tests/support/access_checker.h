// Which memory a fake device knows, and whether the work that touches it is ordered: vector clocks over its streams.
// No lock of its own: FakeDevice calls it under the fakes' mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace hvd::testing {

/// Bytes that a piece of work reads or writes.
struct ByteRange {
  const void* begin = nullptr;
  std::size_t bytes = 0;
};

bool overlap(const ByteRange& a, const ByteRange& b);

/// By stream: how many pieces of work of that stream are known to be done.
using VectorClock = std::vector<std::uint64_t>;

void join(VectorClock& into, const VectorClock& other);

class AccessChecker {
 public:
  using BlockId = std::uint64_t;  ///< 0: no block. Never used twice, so memory that comes back is a new block.

  explicit AccessChecker(std::vector<std::string>& violations) : violations_(violations) {}

  void add(const void* memory, std::size_t bytes);
  /// Bytes that it had. Unknown memory is a violation.
  std::size_t remove(const void* memory);
  /// The block that holds the whole range.
  BlockId find(const ByteRange& range) const;

  /// What happens before this point of stream `stream` is in `clock`; clock[stream] is the number of this work.
  void access(std::size_t stream, const VectorClock& clock, const std::string& work,
              const std::vector<ByteRange>& reads, const std::vector<ByteRange>& writes);

 private:
  struct Block {
    std::size_t bytes = 0;
    BlockId id = 0;
  };
  struct Access {
    ByteRange range;
    bool writes = false;
    std::size_t stream = 0;
    std::uint64_t tick = 0;
    std::string work;
  };

  void note(Access access, const VectorClock& clock);

  std::vector<std::string>& violations_;
  std::map<std::uintptr_t, Block> blocks_;
  BlockId last_id_ = 0;
  std::vector<Access> history_;
};

}  // namespace hvd::testing
