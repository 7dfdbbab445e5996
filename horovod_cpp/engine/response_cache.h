// Remembers agreed responses, so that a repeated request costs a number of one or two bytes instead of a message, for
// every operation. The coordinator decides what is remembered and forgotten and says so in its stream of responses;
// each worker's copy follows that stream, so an id means the same on all ranks. Ids are never used twice.
// Runs under the Turn.
#pragma once

#include <list>
#include <map>
#include <optional>
#include <unordered_map>

#include "horovod_cpp/engine/op_rules/op_rule.h"

namespace hvd {

class ResponseCache {
 public:
  struct Entry {
    CacheId id = 0;
    Request agreed;          ///< as the set's first rank sent it
    ResponseEntry entry;     ///< with the id
    bool announced = false;  ///< coordinator: the members have been sent the entry, from now on its id is enough
    // Coordinator: see standing_calls.h.
    int alone_in_a_row = 0;       ///< agreements
    int wanted_in_a_row = 0;      ///< so many let the response stand; 0: not asked yet
    StandingNumber standing = 0;  ///< as which it stands, or stood last
    bool stands = false;
  };

  const Entry* find(CacheId id) const;
  const Entry* find(const OperationKey& key) const;
  Entry* edit(CacheId id);

  /// The id that stands for `request` of set rank `index`, if what is remembered says just that.
  std::optional<CacheId> id_for(const Request& request, int index) const;

  /// Remembers, or replaces what was remembered under the same key (then under a new id). Newest in use.
  void remember(Entry entry);
  void forget(CacheId id);
  /// Everything of a process set that is no more.
  void forget_set(ProcessSetId process_set);

  void touch(CacheId id);
  void mark_announced(CacheId id);
  /// Ids from the least recently used on, for the coordinator to choose from; at most `count`.
  std::vector<CacheId> oldest(std::size_t count) const;
  std::size_t size() const { return by_id_.size(); }

 private:
  struct Slot {
    Entry entry;
    std::list<CacheId>::iterator use;
  };

  std::unordered_map<CacheId, Slot> by_id_;
  std::map<OperationKey, CacheId> by_key_;
  std::list<CacheId> uses_;  // least recently used first
};

}  // namespace hvd
