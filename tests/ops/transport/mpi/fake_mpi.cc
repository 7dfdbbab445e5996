#include "tests/ops/transport/mpi/fake_mpi.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>

#include "ops/transport/mpi/mpi_limits.h"

namespace hvd::testing {

namespace {
FakeMpi* current = nullptr;  // what the functions of the ABI, which have no argument for it, work on
}

template <int Rank>
struct Calls {
  static int finalized(int* flag) {
    *flag = current->finalized_ ? 1 : 0;
    return 0;
  }
  static void error_text(int error, char* text, std::size_t capacity) {
    std::snprintf(text, capacity, "fake error %d", error);
  }
  static int send(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request) {
    return current->send(FakeMpi::Call::kSend, Rank, data, bytes, peer, tag, request);
  }
  static int send_matched(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request) {
    return current->send(FakeMpi::Call::kSendMatched, Rank, data, bytes, peer, tag, request);
  }
  static int receive(void* place, std::size_t bytes, int peer, int tag, MpiRequest* request) {
    return current->receive(Rank, place, bytes, peer, tag, request);
  }
  static int cancel(MpiRequest* request) { return current->cancel(request); }
  static int test(MpiRequest* requests, int count, MpiOutcome* outcomes, int* finished) {
    return current->test(Rank, requests, count, outcomes, finished);
  }
  static constexpr MpiApi api() {
    MpiApi made{};
    made.struct_bytes = sizeof(MpiApi);
    made.abi_version = kMpiAbiVersion;
    made.finalized = finalized;
    made.error_text = error_text;
    made.send = send;
    made.send_matched = send_matched;
    made.receive = receive;
    made.cancel = cancel;
    made.test = test;
    return made;
  }
};

namespace {
constexpr std::array<MpiApi, FakeMpi::kMostRanks> kApis{Calls<0>::api(), Calls<1>::api(), Calls<2>::api()};
}

FakeMpi::FakeMpi(int ranks, std::uint64_t seed)
    : ranks_(ranks), random_(seed), broken_(static_cast<std::size_t>(ranks)) {
  EXPECT_LE(ranks, kMostRanks);
  EXPECT_EQ(current, nullptr);
  current = this;
}

FakeMpi::~FakeMpi() { current = nullptr; }

const MpiApi& FakeMpi::api(int rank) const { return kApis[static_cast<std::size_t>(rank)]; }

int FakeMpi::unfinished(int rank) const {
  return static_cast<int>(
      std::count_if(requests_.begin(), requests_.end(), [rank](const auto& one) { return one.second.rank == rank; }));
}

int FakeMpi::met() const {
  return static_cast<int>(
      std::count_if(messages_.begin(), messages_.end(), [](const Message& one) { return one.receive != 0; }));
}

bool FakeMpi::strikes(Call call, When when, int rank) {
  bool struck = false;
  std::erase_if(faults_, [&](Fault& fault) {
    if (fault.call != call || fault.when != when || fault.rank != rank || fault.after-- > 0) return false;
    struck = true;
    return true;
  });
  return struck;
}

FakeMpi::Id FakeMpi::add(const Request& request, MpiRequest* handle) {
  const Id id = next_++;
  requests_[id] = request;
  handle->storage[0] = id;
  return id;
}

int FakeMpi::send(Call call, int rank, const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request) {
  EXPECT_TRUE(peer >= 0 && peer < ranks_ && peer != rank) << peer;
  EXPECT_LE(bytes, std::size_t{std::numeric_limits<int>::max()});
  if (strikes(call, When::kStart, rank)) return kFault;
  const bool unmatched = std::any_of(messages_.begin(), messages_.end(), [&](const Message& one) {
    return one.from == rank && one.to == peer && one.tag == tag;
  });
  EXPECT_FALSE(tag >= kMpiFirstTransferTag && unmatched) << "another message to rank " << peer << " has tag " << tag;
  Request made;
  made.call = call;
  made.rank = rank;
  made.peer = peer;
  made.tag = tag;
  made.bytes = bytes;
  const Id id = add(made, request);
  if (strikes(call, When::kEnd, rank)) {
    MpiOutcome failed{};
    failed.error = kFault;
    finish(id, failed);  // and nothing was sent
    return 0;
  }
  Message message;
  message.from = rank;
  message.to = peer;
  message.tag = tag;
  message.data = static_cast<const std::byte*>(data);
  message.bytes = bytes;
  message.send = id;
  messages_.push_back(std::move(message));
  return 0;
}

int FakeMpi::receive(int rank, void* place, std::size_t bytes, int peer, int tag, MpiRequest* request) {
  if (strikes(Call::kReceive, When::kStart, rank)) return kFault;
  Request made;
  made.call = Call::kReceive;
  made.rank = rank;
  made.peer = peer;
  made.tag = tag;
  made.place = static_cast<std::byte*>(place);
  made.bytes = bytes;
  made.fails = strikes(Call::kReceive, When::kEnd, rank);
  add(made, request);
  return 0;
}

int FakeMpi::cancel(MpiRequest* request) {
  const Id id = request->storage[0];
  const auto found = requests_.find(id);
  EXPECT_TRUE(found != requests_.end()) << "a request that is finished was cancelled";
  if (found == requests_.end()) return 0;
  EXPECT_EQ(found->second.call, Call::kReceive);
  found->second.cancelling = true;
  end_if_cancelled(id);
  return 0;
}

// Whoever cancels waits for the end, and not long (MpiEndpoint::stop): where it comes too late, what is on its way
// hurries.
void FakeMpi::end_if_cancelled(Id id) {
  const Request& made = requests_.at(id);
  if (!made.cancelling || made.outcome) return;
  for (std::size_t i = 0; i < messages_.size() && cancels_too_late_ && !made.met; ++i) meet(i);
  for (std::size_t i = 0; i < messages_.size() && made.met; ++i) {
    if (messages_[i].receive != id) continue;
    if (!holds_bytes_) move(i);
    return;
  }
  const auto may_come = [&](const Message& one) {
    return one.receive == 0 && one.to == made.rank && one.tag == made.tag &&
           (made.peer == kMpiAnySource || made.peer == one.from);
  };
  if (cancels_too_late_ && std::any_of(messages_.begin(), messages_.end(), may_come)) return;
  MpiOutcome cancelled{};
  cancelled.cancelled = 1;
  finish(id, cancelled);
}

void FakeMpi::finish(Id id, const MpiOutcome& outcome) { requests_.at(id).outcome = outcome; }

int FakeMpi::test(int rank, MpiRequest* requests, int count, MpiOutcome* outcomes, int* finished) {
  *finished = 0;
  if (broken_[static_cast<std::size_t>(rank)]) return kFault;
  work();
  for (int i = 0; i < count; ++i) {
    const Id id = requests[i].storage[0];
    if (id == 0) continue;
    const auto found = requests_.find(id);
    EXPECT_TRUE(found != requests_.end() && found->second.rank == rank) << "a request that nobody has started";
    if (found != requests_.end()) end_if_cancelled(id);
    if (found == requests_.end() || !found->second.outcome || random_() % 4 == 0) continue;
    MpiOutcome outcome = *found->second.outcome;
    outcome.index = i;
    outcomes[(*finished)++] = outcome;
    requests[i].storage[0] = 0;
    requests_.erase(found);
  }
  std::shuffle(outcomes, outcomes + *finished, random_);
  return 0;
}

// A few of the things that may happen now.
void FakeMpi::work() {
  for (std::uint64_t left = random_() % 4 + 1; left > 0 && !messages_.empty(); --left) {
    const std::size_t index = random_() % messages_.size();
    Message& message = messages_[index];
    if (message.receive != 0) {
      if (!holds_bytes_) move(index);
      continue;
    }
    const auto sent = requests_.find(message.send);
    const bool waits = sent != requests_.end() && !sent->second.outcome;
    if (waits && sent->second.call == Call::kSend && random_() % 2 == 0) {  // MPI has a copy and lets the sender go
      message.copy.assign(message.data, message.data + message.bytes);
      message.data = message.copy.data();
      finish(message.send, MpiOutcome{});
    }
    meet(index);
  }
}

void FakeMpi::meet(std::size_t index) {
  Message& message = messages_[index];
  const bool held = holds_transfers_ && message.tag >= kMpiFirstTransferTag;
  if (held || message.receive != 0 || !comes_first(index)) return;
  message.receive = find_receive(message);
  if (message.receive != 0) requests_.at(message.receive).met = true;
}

// Messages of one rank to another under one tag do not overtake each other.
bool FakeMpi::comes_first(std::size_t index) const {
  const Message& message = messages_[index];
  return std::none_of(
      messages_.begin(), messages_.begin() + static_cast<std::ptrdiff_t>(index), [&](const Message& one) {
        return one.receive == 0 && one.from == message.from && one.to == message.to && one.tag == message.tag;
      });
}

FakeMpi::Id FakeMpi::find_receive(const Message& message) const {
  for (const auto& [id, request] : requests_) {
    const bool fits = request.call == Call::kReceive && request.rank == message.to && request.tag == message.tag &&
                      (request.peer == kMpiAnySource || request.peer == message.from);
    if (fits && !request.met && !request.outcome) return id;
  }
  return 0;
}

void FakeMpi::move(std::size_t index) {
  const Message& message = messages_[index];
  const Request& request = requests_.at(message.receive);
  MpiOutcome outcome{};
  outcome.source = message.from;
  outcome.bytes = message.bytes;
  if (request.fails) {
    outcome.error = kFault;
  } else if (message.bytes > request.bytes) {
    outcome.error = kTruncation;
  } else if (message.bytes > 0) {
    std::memcpy(request.place, message.data, message.bytes);
  }
  finish(message.receive, outcome);
  const auto sent = requests_.find(message.send);
  if (sent != requests_.end() && !sent->second.outcome) finish(message.send, MpiOutcome{});
  messages_.erase(messages_.begin() + static_cast<std::ptrdiff_t>(index));
}

}  // namespace hvd::testing
