// Reads along what the coordinator tells each worker, and holds it against what it told the others: the invariant
// same-sequence. The product's own codec is used; what an id stands for is remembered here, per worker.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "horovod_cpp/engine/request_response.h"
#include "tests/simulator/checker.h"

namespace hvd::simulator {

class ResponseStreams {
 public:
  ResponseStreams(int ranks, Checker& checker) : ranks_(static_cast<std::size_t>(ranks)), checker_(checker) {}

  /// A control message that `rank` is about to get.
  void on_message(int rank, std::span<const std::byte> message);

  /// A worker's operation ended well: its stream must have said so.
  void on_done(int rank, const OperationKey& key);

  /// Calls that a worker was told to carry out.
  std::int64_t calls_told(int rank) const;
  /// Calls of a set that its workers were told of.
  std::int64_t calls_in(ProcessSetId process_set) const;

  std::int64_t calls() const { return calls_; }
  std::int64_t fused_calls() const { return fused_calls_; }
  std::int64_t evictions() const { return evictions_; }

 private:
  struct Rank {
    std::unordered_map<CacheId, ResponseEntry> known;
    std::map<ProcessSetId, std::uint64_t> calls;
    std::map<OperationKey, int> told;  // to carry out, and not ended yet
    std::set<OperationKey> standing;   // to carry out whenever the rank asks for it
  };

  void take(int rank, Response& response);
  static std::uint64_t digest(const Response& response);

  std::vector<Rank> ranks_;
  Checker& checker_;
  struct Call {
    std::uint64_t digest;
    int rank;  // that was told first
  };
  std::map<ProcessSetId, std::vector<Call>> sequences_;
  std::int64_t calls_ = 0;
  std::int64_t fused_calls_ = 0;
  std::int64_t evictions_ = 0;
};

}  // namespace hvd::simulator
