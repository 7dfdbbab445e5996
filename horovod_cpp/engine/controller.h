// The control plane of one rank as a state machine: events in, actions out. Every rank is a worker, which says what it
// has ready and follows the stream of responses; the first rank of the job is the coordinator as well.
// Runs under the Turn.
#pragma once

#include <memory>
#include <set>
#include <unordered_map>

#include "common/counter.h"
#include "horovod_cpp/engine/coordinator.h"
#include "horovod_cpp/engine/standing_calls.h"

namespace hvd {

class Controller {
 public:
  /// `sets` is the worker's table, which the owner reads too; it follows the stream of responses.
  Controller(int rank, ProcessSetTable& sets, CoordinatorSettings settings);

  /// Static process sets, in the order of their ids; before the first event.
  void add_process_set(ProcessSetId id, const std::vector<int>& ranks);

  Actions on_event(const Event& event, TimePoint now);

  bool job_has_ended() const { return ended_; }
  /// Any thread.
  Counter cache_hits() const { return cache_hits_; }

 private:
  bool is_coordinator() const { return coordinator_ != nullptr; }
  int coordinator_rank() const { return sets_.everyone()->first(); }

  void handle(const RequestsEnqueued& event, TimePoint now);
  void handle(const MessageArrived& event, TimePoint now);
  void handle(const PeerLost& event, TimePoint now);
  void handle(const ShutdownWanted& event, TimePoint now);
  void handle(const CallEnded& event, TimePoint now);
  void handle(const StallNoticed& event, TimePoint now);
  void handle(const TimePassed& event, TimePoint now);

  std::optional<CacheId> cached_id(const Request& request) const;
  void ask(RequestsMessage& message, std::optional<CacheId> id, const Request& request);
  void withdraw_standing();
  bool waits_for_standing(RequestsMessage& message, const Request& request);
  void end_standing_flight(const CallEnded& event, TimePoint now);
  void submit(RequestsMessage message, TimePoint now);
  void follow(ResponsesMessage message, TimePoint now);
  bool complete_entry(const Response& response, ResponseEntry& entry, bool as_cache_id);
  bool is_sound(const Response& response, const ResponseEntry& entry) const;
  bool can_apply(const Response& response) const;
  void apply(const Response& response);
  void lose_peer(int rank, const std::string& text);
  void distribute(TimePoint now);
  template <typename Message>
  void to_coordinator(const Message& message);
  Status take_message(int peer, std::span<const std::byte> bytes, TimePoint now);

  int rank_;
  ProcessSetTable& sets_;
  std::unique_ptr<Coordinator> coordinator_;
  Coordinator::Outbox outbox_;
  ResponseCache cache_;
  std::unordered_map<CacheId, Request> sent_as_id_;  // in flight; sent whole if the id is forgotten meanwhile
  std::map<OperationKey, Request> sent_whole_;       // in flight; what a response is remembered with
  StandingCalls standing_;
  std::vector<Request> held_back_;  // until the standing call in flight has ended
  std::uint32_t given_up_ = 0;      // of these, ids of removed sets; the coordinator is to know
  std::set<int> lost_;
  Actions actions_;
  bool ended_ = false;
  Counter cache_hits_;
};

}  // namespace hvd
