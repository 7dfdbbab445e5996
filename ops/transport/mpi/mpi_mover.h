// Moves the bytes of transfers over MPI, piece by piece, and keeps everything that MPI may still touch: memory that is
// on its way out, receives that could not be cancelled, and bytes that nobody wants any more.
// Runs under the Turn.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "ops/transport/mpi/mpi_announcement.h"
#include "ops/transport/mpi/mpi_api.h"
#include "ops/transport/transfer.h"

namespace hvd {

/// Memory that arriving bytes pass through; reused, and never written by us, so that MPI is the first to touch it.
class MpiStaging {
 public:
  struct Block {
    std::unique_ptr<std::byte[]> memory;
    std::size_t capacity = 0;
  };
  Block take(std::size_t bytes);
  void give_back(Block block);

 private:
  std::vector<Block> free_;
};

class MpiMover {
 public:
  /// `largest_tag` is that of the MPI library. Both outlive the mover.
  MpiMover(const MpiApi& api, int size, int largest_tag);
  MpiMover(const MpiMover&) = delete;
  MpiMover& operator=(const MpiMover&) = delete;

  /// A tag that no other transfer to `peer` has; taken back when its send has ended.
  Result<int> lease_tag(int peer);
  /// Sends an announcement. One that MPI loses later ends all that is sent, now and from then on.
  Status mail(MpiLife life, int peer, std::vector<std::byte> message);
  /// Sends a transfer under a leased tag. Its end is told through Transfer::complete, also below.
  void send(MpiLife life, const TransferRef& transfer, int tag, std::uint64_t piece_bytes);
  /// Receives what `announcement` announced, into its place.
  void receive(const TransferRef& transfer, const MpiAnnouncement& announcement);
  /// Receives what `announcement` announced and drops it, so that its sender comes to an end.
  void swallow(const MpiAnnouncement& announcement);

  /// The transfer was ended: what arrives for it goes elsewhere from now on. What is half-way out is still sent.
  void detach(const TransferRef& transfer);
  /// The same for all transfers of `life`, which are not touched any more: their owner is about to go.
  void detach(MpiLife life);

  /// Lets MPI work. True when anything ended.
  bool progress();

  /// Something moves that somebody waits for.
  bool wanted(MpiLife life) const;
  /// Nothing that somebody wants sent is still here.
  bool flushed(MpiLife life) const;
  /// What MPI still holds, wanted or not.
  std::size_t held() const { return moving_.size(); }

 private:
  enum class Kind : std::uint8_t { kMail, kSend, kReceive, kSwallow };
  struct Moving {
    Kind kind = Kind::kMail;
    MpiLife life = 0;
    int peer = -1;
    int tag = 0;
    std::uint64_t bytes = 0;
    std::uint64_t offset = 0;
    std::uint64_t piece_bytes = 0;
    TransferRef transfer;         // kSend, kReceive
    std::vector<std::byte> mail;  // kMail
    MpiStaging::Block staging;    // kSwallow, and kReceive that combines
    bool detached = false;        // nobody is to be told
    bool cancelling = false;      // MPI takes a cancellation once

    bool wanted() const { return !detached && (kind == Kind::kMail || (transfer && !transfer->done())); }
    std::size_t piece() const { return static_cast<std::size_t>(std::min(piece_bytes, bytes - offset)); }
  };
  // The tags to one peer, in turn.
  struct Tags {
    int next = kMpiFirstTransferTag;
    std::set<int> in_use;
  };

  void begin(Moving moving);
  int start_piece(Moving& moving, MpiRequest& request);
  void give_up_receive(std::size_t index);
  bool end_piece(std::size_t index, const MpiOutcome& outcome);  // false: over
  Status take_piece(Moving& moving, const MpiOutcome& outcome);
  void finish(Moving& moving, const Status& status);
  void remove(std::size_t index);
  void break_down(const Status& reason);
  Status error_status(int peer, int error) const;

  const MpiApi& api_;
  int largest_tag_;
  std::vector<Tags> tags_;            // by peer
  std::vector<MpiRequest> requests_;  // parallel to moving_
  std::vector<Moving> moving_;
  std::vector<MpiOutcome> outcomes_;
  MpiStaging staging_;
  Status broken_;  // not ok: MPI itself has failed, or has lost an announcement
};

}  // namespace hvd
