#include "tests/simulator/response_streams.h"

#include <fmt/format.h>

#include <bit>

#include "tests/simulator/random.h"

namespace hvd::simulator {
namespace {

class Digest {
 public:
  Digest& add(std::uint64_t value) {
    hash_ = Random::mix(hash_ ^ value) + 1;
    return *this;
  }
  Digest& add(const std::string& text) {
    for (const char letter : text) hash_ = hash_ * 1099511628211u ^ static_cast<unsigned char>(letter);
    return add(text.size());
  }
  Digest& add(const Shape& shape) {
    for (const std::int64_t dimension : shape) add(static_cast<std::uint64_t>(dimension));
    return add(shape.size());
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 14695981039346656037u;
};

}  // namespace

void ResponseStreams::on_message(int rank, std::span<const std::byte> message) {
  const Result<MessageKind> kind = message_kind(message);
  if (!kind.ok() || kind.value() != MessageKind::kResponses) return;
  Result<ResponsesMessage> decoded = decode_responses(message);
  if (!decoded.ok()) {
    checker_.report(invariant::kSameSequence,
                    fmt::format("rank {} got responses that cannot be read: {}", rank, decoded.status().text()));
    return;
  }
  Rank& state = ranks_[static_cast<std::size_t>(rank)];
  std::size_t place = 0;
  for (Response& response : decoded->responses) {
    for (ResponseEntry& entry : response.entries) {
      const bool as_id = decoded->as_cache_id[place++];
      if (as_id && !state.known.contains(entry.cache_id)) {
        checker_.report(invariant::kSameSequence,
                        fmt::format("rank {} got the cache id {}, which it was never told", rank, entry.cache_id));
        return;
      }
      if (as_id) {
        entry = state.known.at(entry.cache_id);
      } else if (entry.cache_id != 0) {
        state.known[entry.cache_id] = entry;
      }
    }
    take(rank, response);
  }
  evictions_ += static_cast<std::int64_t>(decoded->evicted.size());
}

void ResponseStreams::take(int rank, Response& response) {
  if (response.kind != Response::Kind::kExecute) return;
  Rank& state = ranks_[static_cast<std::size_t>(rank)];
  const std::uint64_t number = state.calls[response.process_set]++;
  std::vector<Call>& sequence = sequences_[response.process_set];
  if (response.call != number) {
    checker_.report(invariant::kSameSequence, fmt::format("rank {} was told call {} of set {} where call {} is due",
                                                          rank, response.call, response.process_set, number));
    return;
  }
  const std::uint64_t wanted = digest(response);
  if (number == sequence.size()) {
    sequence.push_back({wanted, rank});
    ++calls_;
    if (response.entries.size() > 1) ++fused_calls_;
  } else if (sequence[number].digest != wanted) {
    checker_.report(invariant::kSameSequence,
                    fmt::format("call {} of set {} ({} '{}', {} entries) differs between ranks {} and {}", number,
                                response.process_set, name_of(response.op), response.entries.front().name,
                                response.entries.size(), sequence[number].rank, rank));
  }
  if (response.standing != 0) {
    state.standing.insert({response.process_set, response.op, response.entries.front().name});
  }
  for (const ResponseEntry& entry : response.entries) {
    ++state.told[{response.process_set, response.op, entry.name}];
  }
}

std::uint64_t ResponseStreams::digest(const Response& response) {
  Digest digest;
  digest.add(static_cast<std::uint64_t>(response.op)).add(static_cast<std::uint64_t>(response.dtype));
  digest.add(static_cast<std::uint64_t>(response.reduce_op)).add(static_cast<std::uint64_t>(response.root_rank));
  digest.add(std::bit_cast<std::uint64_t>(response.prescale)).add(std::bit_cast<std::uint64_t>(response.postscale));
  digest.add(response.new_process_set);
  for (const ResponseEntry& entry : response.entries) {
    digest.add(entry.name).add(entry.shape).add(entry.first_dims).add(entry.order);
    for (const TensorType& tensor : entry.more) digest.add(tensor.shape).add(tensor.order);
  }
  return digest.value();
}

std::int64_t ResponseStreams::calls_told(int rank) const {
  std::int64_t sum = 0;
  for (const auto& [set, calls] : ranks_[static_cast<std::size_t>(rank)].calls) sum += static_cast<std::int64_t>(calls);
  return sum;
}

std::int64_t ResponseStreams::calls_in(ProcessSetId process_set) const {
  const auto found = sequences_.find(process_set);
  return found == sequences_.end() ? 0 : static_cast<std::int64_t>(found->second.size());
}

void ResponseStreams::on_done(int rank, const OperationKey& key) {
  if (rank == 0) return;  // the coordinator's own part never travels
  Rank& state = ranks_[static_cast<std::size_t>(rank)];
  int& told = state.told[key];
  if (told > 0) {
    --told;
    return;
  }
  if (state.standing.contains(key)) return;  // it was told once for all
  checker_.report(invariant::kSameSequence,
                  fmt::format("{} '{}' of set {} ended well on rank {}, which was never told to carry it out",
                              name_of(key.op), key.name, key.process_set, rank));
}

}  // namespace hvd::simulator
