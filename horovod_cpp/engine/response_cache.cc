#include "horovod_cpp/engine/response_cache.h"

#include <utility>

namespace hvd {

const ResponseCache::Entry* ResponseCache::find(CacheId id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &found->second.entry;
}

ResponseCache::Entry* ResponseCache::edit(CacheId id) {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &found->second.entry;
}

const ResponseCache::Entry* ResponseCache::find(const OperationKey& key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? nullptr : find(found->second);
}

std::optional<CacheId> ResponseCache::id_for(const Request& request, int index) const {
  const Entry* known = find(request.key);
  if (known == nullptr) return std::nullopt;
  const OpRule& rule = *find_op_rule(request.key.op);
  if (!rule.repeats(request, known->agreed, known->entry, index)) return std::nullopt;
  if (request.device != device_of(known->entry, index)) return std::nullopt;
  return known->id;
}

void ResponseCache::remember(Entry entry) {
  if (const Entry* old = find(entry.agreed.key)) forget(old->id);
  const CacheId id = entry.id;
  by_key_[entry.agreed.key] = id;
  by_id_[id] = {std::move(entry), uses_.insert(uses_.end(), id)};
}

void ResponseCache::forget(CacheId id) {
  const auto found = by_id_.find(id);
  if (found == by_id_.end()) return;
  by_key_.erase(found->second.entry.agreed.key);
  uses_.erase(found->second.use);
  by_id_.erase(found);
}

void ResponseCache::forget_set(ProcessSetId process_set) {
  std::vector<CacheId> gone;
  for (const auto& [id, slot] : by_id_) {
    if (slot.entry.agreed.key.process_set == process_set) gone.push_back(id);
  }
  for (const CacheId id : gone) forget(id);
}

void ResponseCache::touch(CacheId id) {
  const auto found = by_id_.find(id);
  if (found != by_id_.end()) uses_.splice(uses_.end(), uses_, found->second.use);
}

void ResponseCache::mark_announced(CacheId id) {
  const auto found = by_id_.find(id);
  if (found != by_id_.end()) found->second.entry.announced = true;
}

std::vector<CacheId> ResponseCache::oldest(std::size_t count) const {
  std::vector<CacheId> ids;
  for (const CacheId id : uses_) {
    if (ids.size() >= count) break;
    ids.push_back(id);
  }
  return ids;
}

}  // namespace hvd
