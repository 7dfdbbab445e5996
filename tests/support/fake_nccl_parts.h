// What the fake NCCL is made of: communicators, and the meetings of their ranks. For the files of FakeNccl alone.
// All of it is guarded by fake_mutex().
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "tests/support/fake_device.h"
#include "tests/support/fake_nccl.h"
#include "tests/support/fake_nccl_call.h"

namespace hvd::testing {
namespace fake_nccl {

using Kind = FakeNcclFault::Kind;
using Lock = std::unique_lock<std::mutex>;

enum class Phase : std::uint8_t { kInit, kReady, kLaunching, kFinalizing, kFinalized, kFailed, kAborted, kDestroyed };

struct Comm;

/// One collective, or one send with its receive: where the work of its members meets.
struct Meeting {
  struct Member {
    bool joined = false;
    bool arrived = false;  ///< its work is the first of its stream
    Call call;
    std::weak_ptr<FakeWork> work;  ///< gone with its device
    std::weak_ptr<Comm> comm;
  };
  std::string signature;
  std::string first;  ///< who gave the signature
  std::vector<Member> members;
  bool agrees = true;
  bool done = false;

  bool all_arrived() const;
};

/// All ranks that share a unique id.
struct Group {
  int number = 0;
  int size = 0;
  std::set<int> ranks;  ///< that called init
  std::map<std::uint64_t, std::shared_ptr<Meeting>> collectives;
  std::map<std::tuple<int, int, std::uint64_t>, std::shared_ptr<Meeting>> pairs;  ///< from, to, number
};

struct Launch {
  void* stream = nullptr;
  std::vector<Call> calls;
};

struct Comm : std::enable_shared_from_this<Comm> {
  std::shared_ptr<Group> group;
  int rank = 0;
  Phase phase = Phase::kInit;
  int polls = 0;
  NcclResult failure = nccl::kSuccess;
  std::string text;
  std::vector<Launch> waiting;  ///< given, but not on their stream yet
  FakeCurrent device;           ///< as it was current at init; the owner may be known at the first launch only
  bool launched = false;
  bool aborting = false;
  bool stuck = false;  ///< what waits never gets to its stream
  bool used_registered = false;
  std::uint64_t calls = 0;  ///< given so far
  std::uint64_t next_collective = 0;
  std::map<std::pair<int, int>, std::uint64_t> next_pair;
  std::size_t pending = 0;  ///< works on streams
  std::size_t begun = 0;    ///< of these, first of their streams
  std::uint64_t next_work = 0;
  std::uint64_t next_to_run = 0;  ///< one after the other, on whichever streams they are

  bool is_dead() const { return phase == Phase::kAborted || phase == Phase::kDestroyed; }
  std::string name() const { return fmt::format("rank {} of communicator {}", rank, group->number); }
};

/// A block of mem_alloc.
struct Memory {
  std::size_t bytes = 0;
  FakeCurrent device;
  std::map<std::uintptr_t, std::weak_ptr<Comm>> registrations;  ///< by handle
};

}  // namespace fake_nccl

struct FakeNccl::State {
  Settings settings;
  std::vector<FakeNcclFault> faults;
  std::map<int, std::shared_ptr<fake_nccl::Group>> groups;       ///< by number
  std::map<nccl::Comm, std::shared_ptr<fake_nccl::Comm>> comms;  ///< dead ones too: no handle is given out twice
  int next_group = 0;
  std::size_t alive = 0;
  std::map<std::byte*, fake_nccl::Memory> memory;
  std::uintptr_t next_registration = 1;
  std::size_t registered_calls = 0;
  std::size_t concurrent_calls = 0;
  std::vector<std::thread::id> abort_threads;
  std::vector<std::string> violations;
  std::string last_error;
};

namespace fake_nccl {

/// The state behind the C functions, or nullptr.
std::shared_ptr<FakeNccl::State>& current();
void violation(std::string text);
/// `call`: the last call of the launch in question.
const FakeNcclFault* find_fault(Kind kind, const Comm& comm, std::uint64_t call = 0);

/// What ranks have to agree on about the memory of a call: nothing for memory that is not of mem_alloc. A violation
/// where that is not registered with the communicator.
std::string memory_text(Comm& comm, const CallRanges& ranges);
void end_registrations(const Comm& comm);

/// Puts the calls on the stream as one piece of work.
NcclResult enqueue(const std::shared_ptr<Comm>& comm, const Launch& launch);

}  // namespace fake_nccl
}  // namespace hvd::testing
