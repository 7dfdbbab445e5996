#include "ops/collective_context.h"

#include <algorithm>
#include <set>
#include <utility>

#include "common/check.h"

namespace hvd {
namespace {

constexpr std::uint64_t kChannels = kFirstStandingChannel;
constexpr std::uint64_t kStandingChannels = (1 << 16) - kChannels;
constexpr int kSequenceBits = 20;         // messages of one call between two ranks; the bits above tell calls apart
constexpr int kStandingSequenceBits = 4;  // likewise, of one use

// Below, a reply costs more than a copy; a setting may ask for it nevertheless.
constexpr std::size_t kSmallestPulled = std::size_t{32} << 10;

// The first message between two ranks. A channel number comes round again; the sequence then starts elsewhere, so what
// a failed call left behind can never be taken for a message of a later one.
TransferKey first_key(std::uint16_t process_set, std::uint64_t call) {
  if (is_standing_call(call)) {
    const auto number = (call >> 32) % kStandingChannels;
    return {process_set, static_cast<std::uint16_t>(kChannels + number),
            static_cast<std::uint32_t>(call) << kStandingSequenceBits};
  }
  return {process_set, static_cast<std::uint16_t>(call % kChannels),
          static_cast<std::uint32_t>(call / kChannels) << kSequenceBits};
}

}  // namespace

CollectiveContext::CollectiveContext(Loop& loop, Fabric& fabric, MembershipRef membership, Settings settings)
    : loop_(loop),
      fabric_(fabric),
      set_(std::move(membership)),
      settings_(std::move(settings)),
      sent_(static_cast<std::size_t>(set_->size())),
      received_(static_cast<std::size_t>(set_->size())) {
  go_by(set_);
}

CollectiveContext::~CollectiveContext() { cancel(Status::internal("the call has ended")); }

void CollectiveContext::go_by(MembershipRef membership) {
  const std::optional<int> index = membership->index_of(fabric_.rank());
  HVD_CHECK(index.has_value());
  membership_ = std::move(membership);
  rank_ = *index;
}

TransferRef CollectiveContext::make(Transfer::Direction direction, int peer, std::size_t bytes) {
  auto transfer = std::make_shared<Transfer>(loop_, settings_.priority);
  transfer->direction = direction;
  transfer->peer = global_rank(peer);
  auto& counters = direction == Transfer::Direction::kSend ? sent_ : received_;
  transfer->key = first_key(settings_.process_set, settings_.call);
  // One count for the call, whichever part a message is of.
  const int place = membership_ == set_ ? peer : set_->index_of(transfer->peer).value_or(0);
  transfer->key.sequence += counters[static_cast<std::size_t>(place)]++;
  transfer->bytes = bytes;
  transfer->may_be_pulled = pulls_ && bytes >= std::min(kSmallestPulled, settings_.pull_from_bytes);
  transfer->keep_alive = settings_.keep_alive;
  return transfer;
}

void CollectiveContext::pull_if_large(std::size_t collective_bytes) {
  pulls_ = settings_.pull_from_bytes > 0 && collective_bytes >= settings_.pull_from_bytes;
}

Pending CollectiveContext::start(TransferRef transfer) {
  if (!cancelled_.ok()) {
    transfer->complete(cancelled_);
    return Pending(std::move(transfer));
  }
  fabric_.start(transfer);
  // The algorithm may be waiting for something else first, which a peer will not send without this one.
  if (transfer->done() && !transfer->status().ok()) cancel(transfer->status());
  if (!transfer->done()) {
    if (in_flight_.size() >= sweep_at_) {
      std::erase_if(in_flight_, [](const TransferRef& one) { return one->done(); });
      sweep_at_ = std::max<std::size_t>(32, 2 * in_flight_.size());
    }
    in_flight_.push_back(transfer);
  }
  return Pending(std::move(transfer));
}

Pending CollectiveContext::send(int to, std::span<const std::byte> bytes) {
  TransferRef transfer = make(Transfer::Direction::kSend, to, bytes.size());
  transfer->data = bytes.data();
  return start(std::move(transfer));
}

Pending CollectiveContext::receive(int from, std::span<std::byte> place) {
  TransferRef transfer = make(Transfer::Direction::kReceive, from, place.size());
  transfer->arrival.out = place.data();
  return start(std::move(transfer));
}

Pending CollectiveContext::receive_combine(int from, std::span<std::byte> out, const std::byte* own,
                                           const Reducer& reducer, OperandOrder order) {
  TransferRef transfer = make(Transfer::Direction::kReceive, from, out.size());
  transfer->arrival = {out.data(), own, reducer.combine, reducer.element_bytes, order == OperandOrder::kIncomingFirst};
  return start(std::move(transfer));
}

Pending CollectiveContext::await_notice(int global_peer, BlockNotice notice) {
  auto transfer = std::make_shared<Transfer>(loop_, settings_.priority);
  transfer->direction = Transfer::Direction::kReceive;
  transfer->peer = global_peer;
  transfer->notice = notice;
  return start(std::move(transfer));
}

void CollectiveContext::hold(std::shared_ptr<void> memory) {
  using Both = std::pair<std::shared_ptr<void>, std::shared_ptr<void>>;
  settings_.keep_alive = std::make_shared<Both>(std::move(settings_.keep_alive), std::move(memory));
}

std::byte* CollectiveContext::lease(std::size_t bytes) {
  std::shared_ptr<std::byte> memory =
      settings_.buffers != nullptr ? settings_.buffers->lease(bytes) : allocate_host(bytes);
  std::byte* const place = memory.get();
  if (place != nullptr) hold(std::move(memory));
  return place;
}

std::vector<int> CollectiveContext::awaited() const {
  std::set<int> ranks;
  for (const TransferRef& transfer : in_flight_) {
    if (!transfer->done()) ranks.insert(transfer->peer);
  }
  return {ranks.begin(), ranks.end()};
}

void CollectiveContext::cancel(const Status& reason) {
  if (!cancelled_.ok()) return;
  cancelled_ = reason;
  const std::vector<TransferRef> ended = std::move(in_flight_);
  for (const TransferRef& transfer : ended) {
    if (!transfer->done()) fabric_.cancel(transfer, reason);
  }
}

}  // namespace hvd
