// MPI in the memory of one process: the messages of all ranks of a job. They arrive and end in an order that is drawn
// from a seed, as late as MPI may read or write their memory, and fail where a test says so. One thread, one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "ops/transport/mpi/mpi_api.h"

namespace hvd::testing {

class FakeMpi {
 public:
  static constexpr int kMostRanks = 3;
  static constexpr int kFault = 7;       ///< the error of an injected fault
  static constexpr int kTruncation = 8;  ///< of a message that is longer than the place for it

  enum class Call : std::uint8_t { kSend, kSendMatched, kReceive };
  enum class When : std::uint8_t { kStart, kEnd };
  /// Strikes once, at the call of this kind on this rank that comes after `after` others.
  struct Fault {
    Call call;
    When when;
    int rank;
    int after = 0;
  };

  FakeMpi(int ranks, std::uint64_t seed);
  ~FakeMpi();
  FakeMpi(const FakeMpi&) = delete;
  FakeMpi& operator=(const FakeMpi&) = delete;

  /// What `rank` calls.
  const MpiApi& api(int rank) const;

  void inject(const Fault& fault) { faults_.push_back(fault); }
  /// Whether `test` fails on that rank.
  void break_tests(int rank, bool broken) { broken_[static_cast<std::size_t>(rank)] = broken; }
  /// Messages of transfers, not announcements, meet no receive.
  void hold_transfers(bool held) { holds_transfers_ = held; }
  /// Messages that have met their receive do not move: a cancellation comes too late for them.
  void hold_bytes(bool held) { holds_bytes_ = held; }
  /// Also for receives whose message is on its way but has not met them.
  void cancel_too_late(bool late) { cancels_too_late_ = late; }
  void set_finalized(bool finalized) { finalized_ = finalized; }

  /// Requests of that rank that have not been told to be finished.
  int unfinished(int rank) const;
  /// Messages that have met a receive and not moved yet.
  int met() const;

 private:
  template <int Rank>
  friend struct Calls;

  using Id = std::uint64_t;
  struct Request {
    Call call = Call::kSend;
    int rank = -1;
    int peer = -1;
    int tag = 0;
    std::byte* place = nullptr;  // kReceive
    std::size_t bytes = 0;
    bool met = false;
    bool fails = false;
    bool cancelling = false;
    std::optional<MpiOutcome> outcome;
  };
  struct Message {
    int from = -1;
    int to = -1;
    int tag = 0;
    const std::byte* data = nullptr;  // in the sender's memory, or in `copy`
    std::size_t bytes = 0;
    Id send = 0;
    Id receive = 0;
    std::vector<std::byte> copy;
  };

  int send(Call call, int rank, const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request);
  int receive(int rank, void* place, std::size_t bytes, int peer, int tag, MpiRequest* request);
  int cancel(MpiRequest* request);
  int test(int rank, MpiRequest* requests, int count, MpiOutcome* outcomes, int* finished);
  void end_if_cancelled(Id id);
  void meet(std::size_t index);
  bool strikes(Call call, When when, int rank);
  Id add(const Request& request, MpiRequest* handle);
  void finish(Id id, const MpiOutcome& outcome);
  void work();
  bool comes_first(std::size_t index) const;
  Id find_receive(const Message& message) const;
  void move(std::size_t index);

  int ranks_;
  std::mt19937_64 random_;
  std::map<Id, Request> requests_;  // in the order in which they were started
  std::vector<Message> messages_;   // in the order in which they were sent
  std::vector<Fault> faults_;
  std::vector<bool> broken_;
  Id next_ = 1;
  bool holds_transfers_ = false;
  bool holds_bytes_ = false;
  bool cancels_too_late_ = false;
  bool finalized_ = false;
};

}  // namespace hvd::testing
