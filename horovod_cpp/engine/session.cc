#include "horovod_cpp/engine/session.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <utility>

#include "common/env_options.h"
#include "common/log.h"
#include "horovod_cpp/engine/device_source.h"
#include "ops/transport/slow_transport.h"

namespace hvd {
namespace {

// Horovod's word for "when start_timeline is called". Here that may be called at any time.
constexpr std::string_view kTimelineLater = "DYNAMIC";

Topology topology_of(const Joined& joined, const Connection& connection) {
  Topology topology;
  topology.rank = connection.rank;
  topology.size = connection.size;
  topology.local_rank = connection.local_rank;
  topology.local_size = connection.local_size;
  topology.cross_rank = connection.cross_rank;
  topology.cross_size = connection.cross_size;
  topology.homogeneous = connection.homogeneous;
  topology.mpi_enabled = joined.mpi() != nullptr;
  topology.mpi_threads_supported = joined.mpi() != nullptr && joined.mpi()->threads_multiple();
  return topology;
}

MembershipRef everyone(const Connection& connection) {
  auto membership = std::make_shared<Membership>();
  for (int rank = 0; rank < connection.size; ++rank) membership->ranks.push_back(rank);
  membership->hosts = connection.hosts;
  return membership;
}

// Sorts the ranks of each static set and checks them against the size of the job.
Result<std::vector<std::vector<int>>> checked_sets(std::vector<std::vector<int>> sets, int size) {
  std::set<std::vector<int>> seen;
  for (std::size_t i = 0; i < sets.size(); ++i) {
    std::vector<int>& ranks = sets[i];
    std::sort(ranks.begin(), ranks.end());
    const bool repeats = std::adjacent_find(ranks.begin(), ranks.end()) != ranks.end();
    if (ranks.empty() || ranks.front() < 0 || ranks.back() >= size || repeats) {
      return Status::invalid_argument(
          fmt::format("process_sets entry number {} needs different ranks from 0 to {}, it has [{}]", i, size - 1,
                      fmt::join(ranks, ", ")));
    }
    if (!seen.insert(ranks).second || static_cast<int>(ranks.size()) == size) {
      return Status::invalid_argument(
          fmt::format("Horovod could not be initialized because process_sets entry number {} is a duplicate: [{}]", i,
                      fmt::join(ranks, ", ")));
    }
  }
  return sets;
}

// Ranks that wait for others in vain may have been given another list than these.
Status with_members(const Status& status, const std::vector<int>& members) {
  if (members.empty()) return status;
  return {status.code(), fmt::format("{} (comm=[{}]: each of these ranks of the launch calls init with this list)",
                                     status.text(), fmt::join(members, ", "))};
}

std::string sets_text(const std::vector<std::vector<int>>& sets) {
  std::string text;
  for (const std::vector<int>& ranks : sets) text += fmt::format("[{}]", fmt::join(ranks, ","));
  return text;
}

}  // namespace

Session::Session(Options options) : options_(std::move(options)) {}

Result<std::unique_ptr<Session>> Session::start(const Settings& settings) {
  Result<Options> options = options_from_environment(settings.options);
  if (!options) return options.status();
  std::unique_ptr<Session> session(new Session(std::move(options).value()));
  const Options& set = session->options_;
  const TimePoint deadline = session->clock_.now() + set.start_timeout;

  Result<std::unique_ptr<Joined>> joined = join_job(settings.members, deadline);
  if (!joined) return joined.status();
  session->joined_ = std::move(joined).value();
  Bootstrap& bootstrap = session->joined_->bootstrap();
  log::configure(static_cast<log::Level>(set.log_level), set.log_hide_time, bootstrap.rank(), bootstrap.size());

  Result<std::vector<std::vector<int>>> sets = checked_sets(settings.process_sets, bootstrap.size());
  if (!sets) return sets.status();
  Result<std::unique_ptr<FaultPlan>> fault = FaultPlan::parse(set.fault, bootstrap.rank());
  const bool slow = fault.ok() && (*fault)->slows_any();
  Handshake handshake;
  handshake.extra = {{"process_sets", sets_text(*sets)}, {"slow ranks in HOROVOD_FAULT", slow ? "some" : "none"}};
  Result<Connection> connection = connect_all(*session->joined_, set, handshake, deadline);
  if (!connection) return with_members(connection.status(), settings.members);
  session->topology_ = topology_of(*session->joined_, *connection);

  if (!fault) return fault.status();  // not before the others have met this rank
  session->fault_ = std::move(fault).value();
  if (slow) connection->fabric->share_blocks(0);  // which no network slows down
  if (const auto rate = session->fault_->bytes_per_second()) slow_down(*connection->fabric, session->clock_, *rate);

  Result<std::unique_ptr<EpollPoller>> poller = EpollPoller::create(session->clock_);
  if (!poller) return poller.status();
  session->poller_ = std::move(poller).value();
  HVD_RETURN_IF_ERROR(connection->fabric->watch_with(*session->poller_));

  Runtime::Settings runtime;
  runtime.everyone = everyone(*connection);
  runtime.process_sets = std::move(sets).value();
  runtime.options = set;
  runtime.devices = &devices_of_this_machine();
  session->timeline_ = std::make_unique<Timeline>(session->clock_, connection->rank, connection->size);
  session->start_timeline();
  runtime.timeline = session->timeline_.get();
  runtime.fault = session->fault_->empty() ? nullptr : session->fault_.get();
  session->runtime_ = std::make_unique<Runtime>(std::move(connection->fabric), session->clock_, std::move(runtime));
  session->loop_ = std::make_unique<BackgroundLoop>(*session->runtime_, *session->poller_);
  return session;
}

// A timeline that cannot be written does not keep the job from starting.
void Session::start_timeline() {
  if (options_.timeline.empty() || options_.timeline == kTimelineLater) return;
  const Status started = timeline_->start(options_.timeline, options_.timeline_mark_cycles);
  if (!started.ok()) log::error("HOROVOD_TIMELINE: {}", started.text());
}

void Session::shut_down() {
  const bool ended = loop_->shut_down();
  timeline_->stop();
  if (runtime_->lost_a_peer()) MpiRuntime::skip_finalize();  // it would wait for the dead
  if (ended && joined_->mpi() != nullptr) joined_->mpi()->close();
}

Session::~Session() {
  if (loop_) shut_down();
}

}  // namespace hvd
