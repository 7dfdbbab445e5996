#include "ops/transport/mpi/mpi_bootstrap.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "ops/transport/mpi/mpi_text.h"
#include "ops/transport/mpi/mpi_wait.h"

namespace hvd {
namespace {

constexpr std::size_t kLargestContribution = std::size_t{16} << 20;
constexpr std::uint64_t kLargestTotal = std::numeric_limits<int>::max();

// What a rank says of itself, and then everybody knows of everybody.
struct Note {
  std::uint64_t bytes = 0;
  std::uint64_t epoch = 0;
  std::uint64_t members = 0;  // a sum of who is to meet: a rank of another list may call the same one
  MpiSeat seat;
};

// FNV-1a.
std::uint64_t sum_of(const std::vector<int>& members) {
  std::uint64_t sum = 0xcbf29ce484222325u;
  for (const int rank : members) sum = (sum ^ static_cast<std::uint64_t>(rank)) * 0x100000001b3u;
  return sum;
}

MpiSeat own_seat() {
  MpiSeat seat;
  seat.pid = ::getpid();
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  std::array<char, 64> pid_namespace{};
  const ssize_t length = ::readlink("/proc/self/ns/pid", pid_namespace.data(), pid_namespace.size() - 1);
  if (boot.empty() || length <= 0) return seat;  // an empty host is like no other
  const std::string host = boot + pid_namespace.data();
  std::memcpy(seat.host.data(), host.data(), std::min(host.size(), seat.host.size()));
  return seat;
}

}  // namespace

// On the heap and shared, since MPI may hold on to it when it fails.
struct MpiBootstrap::Meeting {
  TimePoint start = std::chrono::steady_clock::now();
  TimePoint deadline;
  std::vector<std::byte> mine;
  Note note;
  std::vector<Note> notes;                    // by rank
  std::vector<std::vector<std::byte>> blobs;  // by rank, on rank 0
  std::vector<std::byte> all;
  std::vector<MpiRequest> requests;
  std::vector<MpiOutcome> outcomes;
  double waited_seconds() const { return std::chrono::duration<double>(deadline - start).count(); }

  Status late(std::string_view who) const {
    return Status::deadline_exceeded(
        fmt::format("mpi: {} init within {:.1f} s (HOROVOD_START_TIMEOUT)", who, waited_seconds()));
  }
};

MpiBootstrap::MpiBootstrap(MpiProcess& process, std::vector<int> members)
    : process_(process), members_(std::move(members)), rank_(process.rank), size_(process.size) {
  if (members_.empty()) return;
  rank_ = static_cast<int>(std::find(members_.begin(), members_.end(), process.rank) - members_.begin());
  size_ = static_cast<int>(members_.size());
}

Result<std::vector<std::vector<std::byte>>> MpiBootstrap::allgather(std::span<const std::byte> mine,
                                                                    TimePoint deadline) {
  HVD_RETURN_IF_ERROR(process_.unusable);
  if (mine.size() > kLargestContribution) {
    return Status::invalid_argument(fmt::format("mpi: this rank hands {} bytes to an allgather; the limit is {}",
                                                mine.size(), kLargestContribution));
  }
  const auto meeting = std::make_shared<Meeting>();
  meeting->deadline = deadline;
  meeting->mine.assign(mine.begin(), mine.end());
  if (const Status status = meet(*meeting); !status.ok()) {
    process_.left_with_mpi.push_back(meeting);
    process_.unusable =
        Status::internal(fmt::format("MPI is of no use to this process any more, since an earlier init "
                                     "failed ({}); start the job again",
                                     status.text()));
    return status;
  }
  std::vector<std::vector<std::byte>> result;
  auto at = meeting->all.begin();
  process_.seats.assign(static_cast<std::size_t>(process_.size), MpiSeat{});
  for (std::size_t other = 0; other < meeting->notes.size(); ++other) {
    const Note& note = meeting->notes[other];
    const auto end = at + static_cast<std::ptrdiff_t>(note.bytes);
    result.emplace_back(at, end);
    at = end;
    process_.epoch = std::max(process_.epoch, static_cast<std::uint32_t>(note.epoch));
    process_.seats[static_cast<std::size_t>(place(other))] = note.seat;
  }
  ++process_.epoch;
  return result;
}

Status MpiBootstrap::take_part_in_communicator(TimePoint deadline) {
  Meeting meeting;
  meeting.deadline = deadline;
  HVD_RETURN_IF_ERROR(make_endpoint(meeting));
  if (process_.open_runtimes == 0) process_.endpoint->stop();
  return {};
}

Status MpiBootstrap::meet(Meeting& meeting) {
  HVD_RETURN_IF_ERROR(make_endpoint(meeting));
  meeting.note = {meeting.mine.size(), process_.epoch, sum_of(members_), own_seat()};
  meeting.notes.resize(static_cast<std::size_t>(size()));
  HVD_RETURN_IF_ERROR(rank() == 0 ? collect(meeting) : contribute(meeting));
  const Status late = meeting.late("not all ranks have called (rank 0 names them, or has not come itself)");
  HVD_RETURN_IF_ERROR(broadcast(meeting, std::as_writable_bytes(std::span(meeting.notes)), late));
  std::uint64_t total = 0;
  for (const Note& note : meeting.notes) total += note.bytes;
  if (total > kLargestTotal) {
    return Status::internal(
        fmt::format("mpi: the ranks hand {} bytes to an allgather; the limit is {}", total, kLargestTotal));
  }
  meeting.all.resize(static_cast<std::size_t>(total));
  auto at = meeting.all.begin();
  for (const std::vector<std::byte>& blob : meeting.blobs) at = std::copy(blob.begin(), blob.end(), at);
  return broadcast(meeting, meeting.all, late);
}

Status MpiBootstrap::make_endpoint(const Meeting& meeting) {
  if (process_.endpoint) return {};
  const MpiApi& api = *process_.api;
  MpiOutcome outcome{};
  int finished = 0;
  int error = 0;
  const auto duplicated = [&] {
    error = api.test(&process_.duplicating, 1, &outcome, &finished);
    return error != 0 || finished == 1;
  };
  if (!wait_for_mpi(meeting.deadline, duplicated)) {
    return meeting.late("not all ranks of MPI_COMM_WORLD have called (MPI cannot tell which are missing)");
  }
  HVD_RETURN_IF_ERROR(ended(error != 0 ? error : outcome.error));
  int largest_tag = 0;
  HVD_RETURN_IF_ERROR(ended(api.adopt_communicator(&largest_tag)));
  process_.endpoint = std::make_unique<MpiEndpoint>(api, process_.rank, process_.size, largest_tag);
  process_.endpoint->resume();
  return {};
}

// Rank 0: from each rank a note, then as many bytes as it says.
Status MpiBootstrap::collect(Meeting& meeting) {
  const MpiApi& api = *process_.api;
  const auto ranks = static_cast<std::size_t>(size());
  meeting.notes[0] = meeting.note;
  meeting.blobs.resize(ranks);
  meeting.blobs[0] = meeting.mine;
  meeting.requests.resize(ranks - 1);
  meeting.outcomes.resize(ranks - 1);
  std::vector<bool> has_note(ranks, false);
  Status failure;
  for (std::size_t peer = 1; peer < ranks && failure.ok(); ++peer) {
    failure = ended(
        api.receive(&meeting.notes[peer], sizeof(Note), place(peer), kMpiBootstrapTag, &meeting.requests[peer - 1]));
  }
  std::size_t missing = ranks - 1;
  const auto take = [&](const MpiOutcome& outcome) -> Status {
    HVD_RETURN_IF_ERROR(ended(outcome.error));
    const std::size_t peer = static_cast<std::size_t>(outcome.index) + 1;
    if (has_note[peer]) {
      --missing;
      return {};
    }
    has_note[peer] = true;
    if (meeting.notes[peer].members != meeting.note.members) {
      return Status::invalid_argument(
          fmt::format("mpi: rank {} of the launch has called init with another list of ranks", place(peer)));
    }
    const std::uint64_t bytes = meeting.notes[peer].bytes;
    if (outcome.bytes != sizeof(Note) || bytes > kLargestContribution) {
      return Status::internal(fmt::format("mpi: rank {} hands {} bytes to an allgather; the limit is {}", peer, bytes,
                                          kLargestContribution));
    }
    meeting.blobs[peer].resize(static_cast<std::size_t>(bytes));
    return ended(api.receive(meeting.blobs[peer].data(), meeting.blobs[peer].size(), place(peer), kMpiBootstrapTag,
                             &meeting.requests[peer - 1]));
  };
  const auto collected = [&] {
    int finished = 0;
    const int error = api.test(meeting.requests.data(), static_cast<int>(meeting.requests.size()),
                               meeting.outcomes.data(), &finished);
    if (failure.ok()) failure = ended(error);
    for (int i = 0; i < finished && failure.ok(); ++i) failure = take(meeting.outcomes[static_cast<std::size_t>(i)]);
    return missing == 0 || !failure.ok();
  };
  if (!wait_for_mpi(meeting.deadline, collected)) {
    std::vector<int> absent;
    for (std::size_t peer = 1; peer < ranks; ++peer) {
      if (!has_note[peer]) absent.push_back(place(peer));
    }
    return meeting.late(fmt::format("rank(s) {} of {} have not called", fmt::join(absent, ", "), process_.size));
  }
  return failure;
}

// The other ranks: their part travels while they wait for the broadcast.
Status MpiBootstrap::contribute(Meeting& meeting) {
  const MpiApi& api = *process_.api;
  meeting.requests.resize(2);
  meeting.outcomes.resize(2);
  const int root = place(0);
  HVD_RETURN_IF_ERROR(ended(api.send(&meeting.note, sizeof(Note), root, kMpiBootstrapTag, meeting.requests.data())));
  HVD_RETURN_IF_ERROR(
      ended(api.send(meeting.mine.data(), meeting.mine.size(), root, kMpiBootstrapTag, &meeting.requests[1])));
  int sent = 0;
  int error = 0;
  const auto all_sent = [&] {
    int finished = 0;
    error = api.test(meeting.requests.data(), 2, meeting.outcomes.data(), &finished);
    for (int i = 0; i < finished && error == 0; ++i) error = meeting.outcomes[static_cast<std::size_t>(i)].error;
    sent += finished;
    return error != 0 || sent == 2;
  };
  if (!wait_for_mpi(meeting.deadline, all_sent)) return meeting.late("rank 0 has not called");
  return ended(error);
}

Status MpiBootstrap::broadcast(Meeting& meeting, std::span<std::byte> bytes, const Status& late) {
  if (!members_.empty()) return distribute(meeting, bytes, late);
  const MpiApi& api = *process_.api;
  MpiRequest request{};
  HVD_RETURN_IF_ERROR(ended(api.broadcast(bytes.data(), bytes.size(), 0, &request)));
  MpiOutcome outcome{};
  int finished = 0;
  int error = 0;
  const auto done = [&] {
    error = api.test(&request, 1, &outcome, &finished);
    return error != 0 || finished == 1;
  };
  if (!wait_for_mpi(meeting.deadline, done)) return late;
  return ended(error != 0 ? error : outcome.error);
}

// A broadcast without the ranks that are no members, which take no part in anything that the communicator does as one.
Status MpiBootstrap::distribute(Meeting& meeting, std::span<std::byte> bytes, const Status& late) {
  const MpiApi& api = *process_.api;
  const int count = rank() == 0 ? size() - 1 : 1;
  meeting.requests.assign(static_cast<std::size_t>(count), MpiRequest{});
  meeting.outcomes.resize(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < meeting.requests.size(); ++i) {
    const int error = rank() == 0
                          ? api.send(bytes.data(), bytes.size(), place(i + 1), kMpiBootstrapTag, &meeting.requests[i])
                          : api.receive(bytes.data(), bytes.size(), place(0), kMpiBootstrapTag, &meeting.requests[i]);
    HVD_RETURN_IF_ERROR(ended(error));
  }
  int left = count;
  int error = 0;
  const auto moved = [&] {
    int finished = 0;
    error = api.test(meeting.requests.data(), count, meeting.outcomes.data(), &finished);
    for (int i = 0; i < finished && error == 0; ++i) error = meeting.outcomes[static_cast<std::size_t>(i)].error;
    left -= finished;
    return error != 0 || left == 0;
  };
  if (!wait_for_mpi(meeting.deadline, moved)) return late;
  return ended(error);
}

Status MpiBootstrap::ended(int error) const {
  if (error == 0) return {};
  return Status::internal(fmt::format("mpi: the ranks could not meet: {}", mpi_error_text(*process_.api, error)));
}

}  // namespace hvd
