// This process on the communicator of horovod_cpp: takes in announcements, hands each to the transport that it is meant
// for, and throws away what belongs to transports of the past. Lives until the process ends.
// Runs under the Turn.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/transport/mpi/mpi_announcement.h"
#include "ops/transport/mpi/mpi_api.h"
#include "ops/transport/mpi/mpi_mover.h"

namespace hvd {

class MpiEndpoint {
 public:
  /// A transport, to the endpoint.
  class Receiver {
   public:
    virtual ~Receiver() = default;
    /// `payload` is valid during the call. Announcements of one sender come in the order in which it sent them.
    virtual void on_announcement(const MpiAnnouncement& announcement, std::span<const std::byte> payload) = 0;
    /// Nothing can be received any more.
    virtual void on_failure(const Status& status) = 0;
  };

  MpiEndpoint(const MpiApi& api, int rank, int size, int largest_tag);
  MpiEndpoint(const MpiEndpoint&) = delete;
  MpiEndpoint& operator=(const MpiEndpoint&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  MpiMover& mover() { return mover_; }

  /// Starts to take in announcements, and stops: while stopped, MPI holds no receive of ours, so that the program may
  /// finalise MPI, and what peers send waits in MPI. Waits 100 ms at most.
  void resume();
  void stop();

  /// From now on `receiver` gets what is meant for `life`, and first what came early. A life is opened once.
  void open(MpiLife life, Receiver& receiver);
  /// Until here. What comes later for `life` is thrown away.
  void close(MpiLife life);

  /// Whether MPI has been finalised: nothing else may be called then.
  bool finalized() const;

  /// Lets MPI work. True when anything arrived or ended.
  bool progress();

 private:
  struct Slot {
    MpiRequest request{};
    std::array<std::byte, kMpiMailBytes> message;
  };
  struct Early {
    MpiAnnouncement announcement;
    std::vector<std::byte> payload;
  };

  Status post_slot(Slot& slot);
  bool take_mail();
  bool stop_slot(Slot& slot);
  Status take_message(const MpiOutcome& outcome, std::span<const std::byte> message);
  void dispatch(const MpiAnnouncement& announcement, std::span<const std::byte> payload);
  void fail(const Status& status);

  const MpiApi& api_;
  int rank_;
  int size_;
  MpiMover mover_;
  // Receives for announcements, posted in this order and filled in this order; `next_` is the oldest.
  std::array<Slot, 16> slots_;
  std::size_t next_ = 0;
  std::map<MpiLife, Receiver*> open_;
  MpiLife newest_ = 0;  // ever opened
  std::vector<Early> early_;
  bool receiving_ = false;
  Status failed_;
};

}  // namespace hvd
