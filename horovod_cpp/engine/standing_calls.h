// Calls that ranks make without asking first. What all ranks have called again and again, alone and alike, the
// coordinator lets stand: it numbers the response once, and from then on each member begins the next use of it as soon
// as its own program asks for it. That spares the way to the coordinator and back.
//
// Why ranks stay in step: a use needs something of every member, and changes nothing before it has something of every
// member (see ops/algorithms/direct_allreduce.h). A member that has not begun a use may say that it never will, by
// ending the response there; those that have begun it withdraw, with their tensors as they were, and ask in the old
// way. A member that has begun a use ends the response after that one. So of all ends that are said the lowest counts:
// what comes before it has been begun by all members or will be, and what comes from it on can have ended well on none.
//
// One use is in flight on a rank at a time, and nothing else when it begins: what comes together is better negotiated,
// and fused. A rank that waits for longer than kPatience asks the others: who has not begun the use ends it there, and
// negotiation then says who is missing.
// Runs under the Turn.
#pragma once

#include <limits>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "horovod_cpp/engine/request_response.h"

namespace hvd {

/// Whether a response is one that can stand: an allreduce of one tensor on host memory, which a call that is withdrawn
/// leaves as it was (so without a factor before the sum), and which is remembered.
bool may_stand(const Response& response);

/// The use that a call is whose number says that it is one.
StandingUse use_of_call(std::uint64_t call);

class StandingCalls {
 public:
  static constexpr Duration kPatience = std::chrono::milliseconds(100);

  /// What is to be done when a use will not be begun: peers may have sent for it already.
  using Discards = std::vector<Response>;

  /// A response that came with a number, to one entry that has a cache id; replaces an earlier one for that id.
  void grant(const Response& response);

  /// Whether the next use of `id` may begin.
  bool may_begin(CacheId id) const;
  /// Begins it; `request` is what this rank asked for. The call to carry out.
  Response begin(CacheId id, const Request& request, TimePoint now, Discards& discards);

  /// This rank begins no later use. What the others are to be told, where that is news.
  std::optional<StandingUse> end(CacheId id, Discards& discards);
  std::vector<StandingUse> end_all(Discards& discards);
  std::vector<StandingUse> end_set(ProcessSetId process_set, Discards& discards);

  /// Another member has said so. True when that is about the use in flight, which is then to be withdrawn.
  bool on_ended(StandingUse said, Discards& discards);
  /// Another member waits. What it is to be told, where this rank has not begun that use.
  std::optional<StandingUse> on_overdue(StandingUse said, Discards& discards);

  bool in_flight() const { return flight_.has_value(); }
  /// The call in flight: its process set and number.
  std::pair<ProcessSetId, std::uint64_t> call() const { return {flight_->process_set, flight_->call}; }
  struct Begun {
    Request request;
    StandingUse use;
    bool was_overdue = false;  ///< and the others were told
  };
  /// When it is done, failed or withdrawn: what it was begun for. Nothing for another call, or where its set is no
  /// more.
  std::optional<Begun> on_call_ended(std::uint64_t call);
  /// A call failed, on this rank or on another: what comes after it is negotiated. True when that is about the use in
  /// flight.
  bool on_call_failed(std::uint64_t call, Discards& discards);
  /// `id` is asked for in the old way, though its response stood: the use that this is.
  std::optional<StandingUse> ask(CacheId id);

  /// When the use in flight will have waited for long; kNever without one, or when that has been said.
  TimePoint next_deadline() const { return flight_ ? flight_->overdue_at : kNever; }
  /// It has: what to tell the others.
  StandingUse take_overdue();

  /// Its cache id is no more.
  void forget(CacheId id);
  void forget_set(ProcessSetId process_set);

 private:
  struct Standing {
    Response response;
    std::uint32_t begun = 0;                                        ///< uses that this rank has begun
    std::uint32_t asked = 0;                                        ///< and these and those it asked for since
    std::uint32_t end = std::numeric_limits<std::uint32_t>::max();  ///< the lowest that was said
    bool discarded = false;  ///< what peers may have sent for the first use that is not begun here
  };
  struct Flight {
    StandingUse use;
    ProcessSetId process_set = 0;
    std::uint64_t call = 0;
    Request request;
    TimePoint overdue_at = kNever;
    bool was_overdue = false;
    bool forgotten = false;  ///< with its set: nobody is told of it, but until it has ended no other may begin
  };

  Standing* find(CacheId id);
  Standing* find(StandingUse said);
  static Response use_of(const Standing& standing, std::uint32_t use);
  static void discard_at_end(Standing& standing, Discards& discards);
  template <typename Wanted>
  std::vector<StandingUse> end_if(Wanted wanted, Discards& discards);

  std::map<StandingNumber, Standing> standing_;
  std::unordered_map<CacheId, StandingNumber> numbers_;
  std::optional<Flight> flight_;
};

}  // namespace hvd
