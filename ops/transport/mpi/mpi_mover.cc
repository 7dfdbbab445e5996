#include "ops/transport/mpi/mpi_mover.h"

#include <fmt/format.h>

#include <bit>
#include <utility>

#include "ops/transport/mpi/mpi_text.h"

namespace hvd {
namespace {

constexpr std::size_t kKeptBlocks = 16;
constexpr std::size_t kKeptBlockBytes = std::size_t{1} << 20;

}  // namespace

MpiStaging::Block MpiStaging::take(std::size_t bytes) {
  const auto fits = [bytes](const Block& block) { return block.capacity >= bytes; };
  const auto found = std::find_if(free_.begin(), free_.end(), fits);
  if (found == free_.end()) {
    const std::size_t capacity = std::bit_ceil(std::max(bytes, std::size_t{4096}));
    return {std::make_unique_for_overwrite<std::byte[]>(capacity), capacity};
  }
  std::swap(*found, free_.back());
  Block block = std::move(free_.back());
  free_.pop_back();
  return block;
}

void MpiStaging::give_back(Block block) {
  if (block.memory && block.capacity <= kKeptBlockBytes && free_.size() < kKeptBlocks) {
    free_.push_back(std::move(block));
  }
}

MpiMover::MpiMover(const MpiApi& api, int size, int largest_tag)
    : api_(api), largest_tag_(largest_tag), tags_(static_cast<std::size_t>(size)) {}

Result<int> MpiMover::lease_tag(int peer) {
  Tags& tags = tags_[static_cast<std::size_t>(peer)];
  const auto available = static_cast<std::size_t>(largest_tag_) - kMpiFirstTransferTag + 1;
  if (tags.in_use.size() >= available) {
    return Status::internal(
        fmt::format("{} transfers to rank {} are in flight, as many as MPI has tags for", tags.in_use.size(), peer));
  }
  int tag = 0;
  do {
    tag = tags.next;
    tags.next = tag == largest_tag_ ? kMpiFirstTransferTag : tag + 1;
  } while (!tags.in_use.insert(tag).second);
  return tag;
}

// ---- starting -------------------------------------------------------------------------------------------------------

Status MpiMover::mail(MpiLife life, int peer, std::vector<std::byte> message) {
  HVD_RETURN_IF_ERROR(broken_);
  Moving moving;
  moving.life = life;
  moving.peer = peer;
  moving.bytes = moving.piece_bytes = message.size();
  moving.mail = std::move(message);
  MpiRequest request{};
  if (const int error = start_piece(moving, request); error != 0) return error_status(peer, error);
  requests_.push_back(request);
  moving_.push_back(std::move(moving));
  return {};
}

void MpiMover::send(MpiLife life, const TransferRef& transfer, int tag, std::uint64_t piece_bytes) {
  Moving moving;
  moving.kind = Kind::kSend;
  moving.life = life;
  moving.peer = transfer->peer;
  moving.tag = tag;
  moving.bytes = transfer->bytes;
  moving.piece_bytes = piece_bytes;
  moving.transfer = transfer;
  begin(std::move(moving));
}

void MpiMover::receive(const TransferRef& transfer, const MpiAnnouncement& announcement) {
  Moving moving;
  moving.kind = Kind::kReceive;
  moving.life = announcement.life;
  moving.peer = announcement.sender;
  moving.tag = announcement.tag;
  moving.bytes = announcement.bytes;
  moving.piece_bytes = announcement.piece_bytes;
  moving.transfer = transfer;
  begin(std::move(moving));
}

void MpiMover::swallow(const MpiAnnouncement& announcement) {
  Moving moving;
  moving.kind = Kind::kSwallow;
  moving.life = announcement.life;
  moving.peer = announcement.sender;
  moving.tag = announcement.tag;
  moving.bytes = announcement.bytes;
  moving.piece_bytes = announcement.piece_bytes;
  begin(std::move(moving));
}

void MpiMover::begin(Moving moving) {
  if (!broken_.ok()) {
    finish(moving, broken_);
    return;
  }
  MpiRequest request{};
  if (const int error = start_piece(moving, request); error != 0) {
    finish(moving, error_status(moving.peer, error));
    return;
  }
  requests_.push_back(request);
  moving_.push_back(std::move(moving));
}

// One piece at a time: a piece is either a whole segment or very long, so that the gap between two does not show.
int MpiMover::start_piece(Moving& moving, MpiRequest& request) {
  const std::size_t piece = moving.piece();
  switch (moving.kind) {
    case Kind::kMail:
      return api_.send(moving.mail.data(), piece, moving.peer, kMpiMailTag, &request);
    case Kind::kSend:
      // Matched: once a send has ended no message under its tag is on its way, and the tag is free.
      return api_.send_matched(moving.transfer->data + moving.offset, piece, moving.peer, moving.tag, &request);
    case Kind::kReceive:
      if (moving.transfer->arrival.combine == nullptr) {
        return api_.receive(moving.transfer->arrival.out + moving.offset, piece, moving.peer, moving.tag, &request);
      }
      break;
    case Kind::kSwallow:
      break;
  }
  if (!moving.staging.memory) moving.staging = staging_.take(piece);
  return api_.receive(moving.staging.memory.get(), piece, moving.peer, moving.tag, &request);
}

// ---- ending ---------------------------------------------------------------------------------------------------------

bool MpiMover::progress() {
  if (moving_.empty() || !broken_.ok()) return false;
  outcomes_.resize(moving_.size());
  int finished = 0;
  const int error = api_.test(requests_.data(), static_cast<int>(requests_.size()), outcomes_.data(), &finished);
  if (error != 0) {
    break_down(Status::internal(fmt::format("MPI has failed: {}", mpi_error_text(api_, error))));
    return true;
  }
  const std::span<MpiOutcome> outcomes = std::span(outcomes_).first(static_cast<std::size_t>(finished));
  // The last entry takes the place of a removed one, so go from the back.
  std::sort(outcomes.begin(), outcomes.end(),
            [](const MpiOutcome& a, const MpiOutcome& b) { return a.index > b.index; });
  for (const MpiOutcome& outcome : outcomes) {
    const auto index = static_cast<std::size_t>(outcome.index);
    if (!broken_.ok() || !end_piece(index, outcome)) remove(index);
  }
  return finished > 0;
}

bool MpiMover::end_piece(std::size_t index, const MpiOutcome& outcome) {
  Moving& moving = moving_[index];
  Status status = outcome.error == 0 ? take_piece(moving, outcome) : error_status(moving.peer, outcome.error);
  if (status.ok() && moving.offset < moving.bytes) {
    const int error = start_piece(moving, requests_[index]);
    if (error == 0) return true;
    status = error_status(moving.peer, error);
  }
  finish(moving, status);
  // Whoever it was for waits in vain for a transfer that may have ended here long ago. So no other one may go on as if
  // all were well: their calls fail, and tell the other ranks.
  if (moving.kind == Kind::kMail && !moving.detached && !status.ok()) break_down(status);
  return false;
}

Status MpiMover::take_piece(Moving& moving, const MpiOutcome& outcome) {
  const std::size_t piece = moving.piece();
  if (moving.kind == Kind::kReceive && !moving.wanted()) {
    // Its memory may be gone, and MPI has let go of it. The rest still comes and must not be taken for another
    // transfer.
    moving.kind = Kind::kSwallow;
    moving.transfer.reset();
    staging_.give_back(std::exchange(moving.staging, {}));
  }
  if (outcome.cancelled != 0) return {};  // this piece is still to come
  if (moving.kind == Kind::kReceive) {
    if (outcome.bytes != piece) {
      return Status::internal(
          fmt::format("rank {} sent {} bytes where it had announced {} (mpi)", moving.peer, outcome.bytes, piece));
    }
    if (moving.transfer->arrival.combine == nullptr) {
      moving.transfer->skip(piece);
    } else {
      moving.transfer->deliver({moving.staging.memory.get(), piece});
    }
  }
  moving.offset += piece;
  return {};
}

void MpiMover::finish(Moving& moving, const Status& status) {
  staging_.give_back(std::exchange(moving.staging, {}));
  // After an error the tag stays leased: some of its messages may be on their way.
  if (moving.kind == Kind::kSend && status.ok()) tags_[static_cast<std::size_t>(moving.peer)].in_use.erase(moving.tag);
  if (moving.transfer && !moving.detached) moving.transfer->complete(status);
}

void MpiMover::remove(std::size_t index) {
  moving_[index] = std::move(moving_.back());
  requests_[index] = requests_.back();
  moving_.pop_back();
  requests_.pop_back();
}

void MpiMover::break_down(const Status& reason) {
  broken_ = reason;
  for (Moving& moving : moving_) {  // kept: MPI may still touch their memory
    if (moving.transfer && !moving.detached) moving.transfer->complete(broken_);
    moving.detached = true;
  }
}

Status MpiMover::error_status(int peer, int error) const {
  return Status::internal(fmt::format("a transfer with rank {} failed in MPI: {}", peer, mpi_error_text(api_, error)));
}

// ---- letting go -----------------------------------------------------------------------------------------------------

void MpiMover::detach(const TransferRef& transfer) {
  for (std::size_t i = 0; i < moving_.size(); ++i) {
    if (moving_[i].transfer == transfer && moving_[i].kind == Kind::kReceive) give_up_receive(i);
  }
}

void MpiMover::detach(MpiLife life) {
  for (std::size_t i = 0; i < moving_.size(); ++i) {
    if (moving_[i].life != life) continue;
    moving_[i].detached = true;
    if (moving_[i].kind == Kind::kReceive) give_up_receive(i);
  }
}

// When the cancellation comes too late the receive ends by itself; either way `progress` sees it.
void MpiMover::give_up_receive(std::size_t index) {
  if (!broken_.ok() || std::exchange(moving_[index].cancelling, true)) return;
  static_cast<void>(api_.cancel(&requests_[index]));
}

bool MpiMover::wanted(MpiLife life) const {
  return std::any_of(moving_.begin(), moving_.end(),
                     [life](const Moving& moving) { return moving.life == life && moving.wanted(); });
}

bool MpiMover::flushed(MpiLife life) const {
  return std::none_of(moving_.begin(), moving_.end(), [life](const Moving& moving) {
    return moving.life == life && moving.wanted() && moving.kind != Kind::kReceive;
  });
}

}  // namespace hvd
