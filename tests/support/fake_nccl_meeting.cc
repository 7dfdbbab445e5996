// From calls to work on streams, and how the work of several ranks meets.
#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "tests/support/fake_nccl_parts.h"

namespace hvd::testing::fake_nccl {

bool Meeting::all_arrived() const {
  return std::ranges::all_of(members, [](const Member& member) {
    const std::shared_ptr<Comm> comm = member.comm.lock();
    return member.arrived && comm && !comm->is_dead();
  });
}

namespace {

struct Part {
  std::shared_ptr<Meeting> meeting;
  std::size_t member = 0;
};

/// Runs it unless ranks disagree or a member's memory is gone: then outputs stay as they are.
void hold(Meeting& meeting) {
  if (std::exchange(meeting.done, true) || !meeting.agrees) return;
  const bool live = std::ranges::all_of(meeting.members, [](const Meeting::Member& member) {
    const std::shared_ptr<FakeWork> work = member.work.lock();
    return work && work->device->is_live_locked(*work);
  });
  if (!live) return;
  std::vector<Call> calls;
  for (const Meeting::Member& member : meeting.members) calls.push_back(member.call);
  take_place(calls);
}

std::shared_ptr<Meeting> open_meeting(std::shared_ptr<Meeting>& place, std::size_t members) {
  if (!place) {
    place = std::make_shared<Meeting>();
    place->members.resize(members);
  }
  return place;
}

Part join_meeting(Comm& comm, const Call& call, const std::shared_ptr<FakeWork>& work) {
  Group& group = *comm.group;
  Part part;
  std::string what;
  if (call.is_pair()) {
    const bool sends = call.kind == CallKind::kSend;
    const int from = sends ? comm.rank : call.peer;
    const int to = sends ? call.peer : comm.rank;
    // A rank that sends to itself counts both ends, so the two sides have counters of their own.
    const std::uint64_t number = comm.next_pair[sends ? std::pair{to, 0} : std::pair{from, 1}]++;
    what = fmt::format("send {} from {} to {}", number, from, to);
    const auto key = std::tuple{from, to, number};
    part = {open_meeting(group.pairs[key], 2), sends ? 0U : 1U};
    if (part.meeting->members[sends ? 1 : 0].joined) group.pairs.erase(key);
  } else {
    const std::uint64_t number = comm.next_collective++;
    what = fmt::format("call {}", number);
    part = {open_meeting(group.collectives[number], static_cast<std::size_t>(group.size)),
            static_cast<std::size_t>(comm.rank)};
    const auto others = std::ranges::count_if(part.meeting->members, [](const auto& member) { return member.joined; });
    if (others + 1 == group.size) group.collectives.erase(number);
  }
  Meeting& meeting = *part.meeting;
  Meeting::Member& member = meeting.members[part.member];
  member = {true, false, call, work, comm.shared_from_this()};
  const std::string mine = signature(call) + memory_text(comm, ranges_of(call, comm.rank, comm.group->size));
  if (meeting.first.empty()) {
    meeting.signature = mine;
    meeting.first = fmt::format("rank {}", comm.rank);
  } else if (meeting.signature != mine) {
    meeting.agrees = false;
    violation(fmt::format("ranks disagree in NCCL {} of communicator {}: {} has {}, rank {} has {}", what, group.number,
                          meeting.first, meeting.signature, comm.rank, mine));
  }
  return part;
}

void begin(Comm& comm) {
  if (current()) {
    for (const auto& [handle, other] : current()->comms) {
      const bool is_here = other->device.owner == comm.device.owner && other->device.device == comm.device.device;
      if (other.get() != &comm && is_here && !other->is_dead() && other->begun > 0) ++current()->concurrent_calls;
    }
  }
  ++comm.begun;
}

bool is_ready(const Comm& comm, const std::vector<Part>& parts, std::uint64_t last) {
  if (comm.is_dead()) return true;
  if (find_fault(Kind::kCollectiveHangs, comm, last) != nullptr) return false;
  if (find_fault(Kind::kAsyncError, comm, last) != nullptr) return false;
  bool ready = true;
  for (const Part& part : parts) {
    if (!std::exchange(part.meeting->members[part.member].arrived, true)) fake_changed_locked();
    ready = ready && (part.meeting->done || part.meeting->all_arrived());
  }
  return ready;
}

std::shared_ptr<FakeWork> make_work(const std::shared_ptr<Comm>& comm, const std::vector<Call>& calls,
                                    std::uint64_t last) {
  if (comm->is_dead()) {
    violation(fmt::format("a graph uses {}, which is gone", comm->name()));
    return nullptr;
  }
  auto work = std::make_shared<FakeWork>();
  std::vector<Part> parts;
  for (const Call& call : calls) {
    work->name += fmt::format("{}{}", work->name.empty() ? "" : "+", kCallNames[static_cast<std::size_t>(call.kind)]);
    const CallRanges ranges = ranges_of(call, comm->rank, comm->group->size);
    work->reads.push_back(ranges.read);
    work->writes.push_back(ranges.write);
    if (!is_in_place_or_apart(call, comm->rank, comm->group->size)) {
      violation(fmt::format("{}: {}: output and input overlap, but not as an operation in place",
                            kCallNames[static_cast<std::size_t>(call.kind)], comm->name()));
    }
    parts.push_back(join_meeting(*comm, call, work));
  }
  ++comm->pending;
  work->ready = [comm, parts, last, number = comm->next_work++, has_begun = false]() mutable {
    if (number != comm->next_to_run && !comm->is_dead()) return false;
    if (!std::exchange(has_begun, true)) begin(*comm);
    return is_ready(*comm, parts, last);
  };
  work->run = [comm, parts] {
    if (comm->is_dead()) return;
    for (const Part& part : parts) hold(*part.meeting);
  };
  work->finish = [comm, parts] {
    --comm->pending;
    --comm->begun;
    ++comm->next_to_run;
    if (comm->is_dead()) return;
    for (const Part& part : parts) part.meeting->done = true;
  };
  return work;
}

}  // namespace

NcclResult enqueue(const std::shared_ptr<Comm>& comm, const Launch& launch) {
  // Each device has a default stream, under one name: it is that of the device that is current.
  const bool is_default = launch.stream == nullptr;
  FakeDevice* owner = is_default ? fake_current().owner : FakeDevice::find_locked(launch.stream);
  const int number = is_default         ? fake_current().device
                     : owner != nullptr ? FakeDevice::number_locked(launch.stream)
                                        : 0;
  const bool is_ours = owner != nullptr && (comm->device.owner == nullptr || comm->device.owner == owner) &&
                       comm->device.device == number;
  if (!is_ours) {
    violation(fmt::format("{} uses a stream that is not of the device that was current at its init", comm->name()));
    return nccl::kInvalidArgument;
  }
  comm->device.owner = owner;
  comm->calls += launch.calls.size();
  const std::uint64_t last = comm->calls - 1;
  const Status status =
      owner->enqueue_locked(launch.stream, [comm, calls = launch.calls, last] { return make_work(comm, calls, last); });
  return status.ok() ? nccl::kSuccess : nccl::kUnhandledCudaError;
}

}  // namespace hvd::testing::fake_nccl
