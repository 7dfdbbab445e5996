// The coordinator's part of negotiation: merges what all ranks have ready, agrees, fuses, and numbers the calls.
// One for all process sets, on the first rank of the job. Runs under that rank's Turn.
//
// Its answers form one ordered stream, of which each rank gets the part that concerns its sets. So all ranks start
// the calls of overlapping sets in the same order, and a set that waits delays no other.
#pragma once

#include <map>
#include <set>
#include <unordered_map>

#include "horovod_cpp/engine/agreement.h"
#include "horovod_cpp/engine/control_plane.h"
#include "horovod_cpp/engine/fusion_planner.h"
#include "horovod_cpp/engine/process_set_table.h"
#include "horovod_cpp/engine/timeline.h"

namespace hvd {

struct CoordinatorSettings {
  FusionLimits fusion;
  std::size_t cache_capacity = 0;
  Duration company_time{};         ///< longest wait of a small ready tensor for others to fuse with
  Duration stall_shutdown_time{};  ///< 0: never
  std::size_t standing_limit_bytes = 0;
  int standing_after = 0;        ///< 0: no response stands
  Timeline* timeline = nullptr;  ///< told who asked, and what was agreed
};

class Coordinator {
 public:
  /// A part of the stream for one rank; the rank may be this one.
  struct Outbox {
    std::map<int, ResponsesMessage> responses;
    std::vector<std::pair<int, std::vector<std::byte>>> messages;
  };

  Coordinator(MembershipRef everyone, CoordinatorSettings settings);

  /// Static process sets, at start.
  void add_process_set(ProcessSetId id, const std::vector<int>& ranks) { sets_.add(id, ranks); }

  void on_requests(int rank, RequestsMessage message, TimePoint now, Outbox& out);
  void on_shutdown(int rank, Outbox& out);
  void on_peer_lost(int rank, const std::string& reason, Outbox& out);
  void on_call_failed(int rank, const CallFailedMessage& message, Outbox& out);
  StallReportMessage on_stall_query(int rank, const StallQueryMessage& query) const;
  /// The coordinator's own calls in flight: while there are any, small tensors may wait for company.
  void set_in_flight(int calls) { in_flight_ = calls; }
  /// Sends what is due. Call after each batch of events.
  void flush(TimePoint now, Outbox& out);
  /// When `flush` has to be called again at the latest.
  TimePoint next_deadline() const;

 private:
  struct Held {
    Response response;
    TimePoint until;
  };

  struct Standing {
    CacheId id = 0;
    OperationKey key;
    std::map<int, TimePoint> overdue;     // since when ranks say that they wait for others in a use, by rank
    std::map<int, std::uint32_t> asked;   // uses that ranks asked for after its end, by rank
    std::optional<std::uint32_t> failed;  // a use that failed on a rank: what is asked for it is not for the others
    std::string failure;
  };

  // nullptr for a number that was never given.
  Standing* standing(StandingNumber number);
  void take_request(int rank, Request request, TimePoint now, Outbox& out);
  void take_cached(int rank, CacheId id, TimePoint now);
  void settle(const OperationKey& key, TimePoint now);
  void note_answer(const ReadinessTable::Pending& pending) const;
  bool is_ready(const OperationKey& key) const;
  std::string hint(const OperationKey& key, const ReadinessTable::Pending& pending) const;
  std::vector<int> silent_among(std::vector<int> ranks) const;
  std::vector<int> really_missing(const ReadinessTable::Pending& pending) const;
  std::vector<int> joined_missing(const ReadinessTable::Pending& pending) const;
  void take_joins(TimePoint now);
  void settle_process_set(Response& response, const Request& agreed);
  void choose_devices_of_joined(Response& response) const;
  void remember(Agreement& agreement);
  void make_room(Outbox& out);
  void take_standing_uses(int rank, RequestsMessage& message, TimePoint now, Outbox& out);
  std::optional<ReadinessTable::Pending> waiting_in_use(const Standing& standing) const;
  std::map<OperationKey, ReadinessTable::Pending> waiting_in_uses() const;
  void refuse_failed_uses(int rank, RequestsMessage& message, Outbox& out);
  void fail_standing_use(const CallFailedMessage& message, Outbox& out);
  void end_standing(const Standing& ended);
  void let_stand(std::vector<Response>& agreed);
  void send(Response response, Outbox& out);
  void send_to(const std::vector<int>& ranks, const Response& response, Outbox& out);
  void end_job(StatusCode code, const std::string& text, Outbox& out);
  void check_stalls(TimePoint now, Outbox& out);
  bool company_is_over(TimePoint now) const;
  std::string call_site_text(int rank, std::uint32_t call_site) const;

  MembershipRef everyone_;
  CoordinatorSettings settings_;
  ProcessSetTable sets_;
  ReadinessTable readiness_;
  ResponseCache cache_;
  CacheId next_cache_id_ = 1;
  std::vector<Held> ready_;  // agreed and not yet sent, in the agreed order
  std::map<ProcessSetId, std::uint64_t> calls_;
  std::map<std::pair<int, std::uint32_t>, std::string> call_sites_;
  std::set<int> lost_;
  std::map<int, std::uint32_t> forgotten_;  // ids that came too late, by rank; their requests will come whole
  std::set<int> joining_;                   // ranks that want to join, and from which such requests may yet come
  std::set<int> joined_;                    // ranks that have no more data; until all have joined
  int last_joined_ = -1;
  std::map<int, std::int32_t> last_devices_;  // by rank; none of those that never had a tensor on one
  std::vector<Standing> standing_;            // all that have ever been let stand: number n at n - 1
  int in_flight_ = 0;
  bool ended_ = false;
};

}  // namespace hvd
