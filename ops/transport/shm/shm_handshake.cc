#include "ops/transport/shm/shm_handshake.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <bit>
#include <cstring>
#include <memory>
#include <utility>

#include "common/check.h"

namespace hvd {
namespace {

constexpr std::uint64_t kMaxRingBytes = std::uint64_t{1} << 30;

bool is_ring_size(std::uint64_t bytes) {
  return std::has_single_bit(bytes) && bytes >= kPairControlBytes && bytes <= kMaxRingBytes;
}

}  // namespace

ShmNonce random_nonce() {
  ShmNonce nonce;
  const ssize_t got = ::getrandom(nonce.data(), nonce.size(), 0);
  HVD_CHECK(got == static_cast<ssize_t>(nonce.size()));  // cannot fail for so few bytes
  return nonce;
}

ShmHandshake ShmHandshake::call(ShmSelf& self, int peer, std::string name) {
  ShmHandshake handshake(self, std::make_unique<ShmPeer>(peer, UniqueFd()), Stage::kGreeting);
  handshake.name_ = std::move(name);
  return handshake;
}

ShmHandshake ShmHandshake::answer(ShmSelf& self, UniqueFd socket) {
  return {self, std::make_unique<ShmPeer>(-1, std::move(socket)), Stage::kAwaitingHello};
}

void ShmHandshake::advance() {
  Stage before{};
  do {
    before = stage_;
    step();
  } while (stage_ != before);
}

void ShmHandshake::step() {
  switch (stage_) {
    case Stage::kGreeting:
      return greet();
    case Stage::kAwaitingAnswer:
      return take_answer();
    case Stage::kAwaitingHello:
      return take_hello();
    case Stage::kAnswering:
      return send_answer();
    case Stage::kAwaitingCommit:
      return take_commit();
    case Stage::kAgreed:
    case Stage::kFailed:
      return;
  }
}

// ---- caller ---------------------------------------------------------------------------------------------------------

void ShmHandshake::greet() {
  if (peer_->pair.bytes().empty()) {  // not connected yet
    const ShmDial dialled = dial(name_, peer_->socket);
    if (dialled == ShmDial::kBusy) return;
    if (dialled == ShmDial::kNobody) return fail("nobody listens at its address any more");
    const std::optional<ShmCredentials> credentials = credentials_of(fd());
    // Before anything is said: the token is for processes of this user only.
    if (!credentials || credentials->uid != self_->uid) return fail("its process belongs to another user");
    peer_->pid = credentials->pid;
    if (const Status made = make_memory(); !made.ok()) return decline(made.text());
  }
  std::vector<int> descriptors = own_descriptors();
  descriptors.insert(descriptors.begin(), pair_file_.get());
  const ShmSent sent = send(ShmWord::kHello, std::move(descriptors));
  if (sent == ShmSent::kNo) fail("it closed the connection");
  if (sent == ShmSent::kYes) stage_ = Stage::kAwaitingAnswer;
}

Status ShmHandshake::make_memory() {
  peer_->ring_bytes = self_->ring_bytes;
  const std::size_t bytes = pair_memory_bytes(peer_->ring_bytes);
  Result<UniqueFd> file = create_memory_file("horovod_cpp rings", bytes);
  if (!file) return file.status();
  Result<SharedMapping> pair = SharedMapping::map(file->get(), bytes);
  if (!pair) return pair.status();
  peer_->pair = std::move(*pair);
  pair_file_ = std::move(*file);
  std::construct_at(&peer_->control());
  nonce_ = caller_nonce() = peer_->probe = random_nonce();
  return {};
}

void ShmHandshake::take_answer() {
  std::vector<UniqueFd> descriptors;
  const std::optional<ShmGreeting> answer = receive(descriptors);
  if (!answer) return;
  if (answer->word != ShmWord::kAccept) return fail("it declined (its own warning says why)");
  if (answer->nonce != answerer_nonce()) return decline("the two processes do not see the same memory");
  Status status = adopt_descriptors(std::move(descriptors), answer->has_process);
  if (status.ok()) status = self_->wakeup->watch(*peer_);
  if (!status.ok()) return decline(status.text());
  peer_->can_pull = answer->can_pull && reads_memory_of(*answer);
  if (send(ShmWord::kCommit) != ShmSent::kYes) return fail("it closed the connection");
  pair_file_.reset();
  stage_ = Stage::kAgreed;
}

// ---- answerer -------------------------------------------------------------------------------------------------------

void ShmHandshake::take_hello() {
  std::vector<UniqueFd> descriptors;
  const std::optional<ShmGreeting> hello = receive(descriptors);
  if (!hello) return;
  const std::optional<ShmCredentials> credentials = credentials_of(fd());
  const bool right_user = credentials && credentials->uid == self_->uid;
  const bool right_token = equal_in_constant_time(hello->token, self_->job_token);
  if (const std::string objection = objection_to(*hello); !objection.empty()) return decline(objection);
  // A stranger, who has neither, cannot end the wait for the rank that it claims to be.
  if (!right_user && !right_token) return decline("a stranger");
  peer_->rank = static_cast<int>(hello->from);
  self_->awaited[hello->from] = false;
  if (hello->word == ShmWord::kDecline) return fail("it declined (its own warning says why)");
  if (!right_user) return decline("its process belongs to another user");
  if (!right_token) return decline("it has another job token");
  peer_->pid = credentials->pid;
  if (descriptors.empty()) return decline("its hello brought no memory");
  Status status = adopt_memory(*hello, descriptors.front().get());
  descriptors.erase(descriptors.begin());
  if (status.ok()) status = adopt_descriptors(std::move(descriptors), hello->has_process);
  if (status.ok()) status = self_->wakeup->watch(*peer_);
  if (!status.ok()) return decline(status.text());
  nonce_ = answerer_nonce() = peer_->probe = random_nonce();
  peer_->can_pull = reads_memory_of(*hello);
  stage_ = Stage::kAnswering;
}

// What makes the packet no hello to this rank at all; empty when it is one.
std::string ShmHandshake::objection_to(const ShmGreeting& hello) const {
  const bool awaited = hello.from < self_->awaited.size() && self_->awaited[hello.from];
  if (hello.word != ShmWord::kHello && hello.word != ShmWord::kDecline) return "it does not begin with a hello";
  if (hello.to != static_cast<std::uint32_t>(self_->rank) || hello.size != static_cast<std::uint32_t>(self_->size)) {
    return fmt::format("its hello is for rank {} of {}", hello.to, hello.size);
  }
  return awaited ? std::string() : fmt::format("it says that it is rank {}, which is not awaited", hello.from);
}

Status ShmHandshake::adopt_memory(const ShmGreeting& hello, int file) {
  if (!is_ring_size(hello.ring_bytes)) {
    return Status::unavailable(fmt::format("it offered rings of {} bytes", hello.ring_bytes));
  }
  peer_->ring_bytes = static_cast<std::size_t>(hello.ring_bytes);
  Result<SharedMapping> pair = SharedMapping::map(file, pair_memory_bytes(peer_->ring_bytes));
  if (!pair) return pair.status();
  peer_->pair = std::move(*pair);
  if (hello.nonce != caller_nonce()) return Status::unavailable("the two processes do not see the same memory");
  return {};
}

void ShmHandshake::send_answer() {
  const ShmSent sent = send(ShmWord::kAccept, own_descriptors());
  if (sent == ShmSent::kNo) fail("it closed the connection");
  if (sent == ShmSent::kYes) stage_ = Stage::kAwaitingCommit;
}

void ShmHandshake::take_commit() {
  std::vector<UniqueFd> descriptors;
  const std::optional<ShmGreeting> word = receive(descriptors);
  if (!word) return;
  if (word->word != ShmWord::kCommit) return fail("it declined (its own warning says why)");
  peer_->can_pull = word->can_pull;
  stage_ = Stage::kAgreed;
}

// ---- both -----------------------------------------------------------------------------------------------------------

Status ShmHandshake::adopt_descriptors(std::vector<UniqueFd> descriptors, bool has_process) {
  const std::size_t expected = has_process ? 3 : 2;
  if (descriptors.size() != expected) {
    return Status::unavailable(fmt::format("{} descriptors arrived instead of {}", descriptors.size(), expected));
  }
  Result<SharedMapping> presence = SharedMapping::map(descriptors[1].get(), self_->wakeup->presence_bytes());
  if (!presence) return presence.status();
  peer_->presence = std::move(*presence);
  peer_->doorbell = std::move(descriptors[0]);
  if (has_process) peer_->process = std::move(descriptors[2]);
  return {};
}

ShmNonce& ShmHandshake::caller_nonce() const { return peer_->control().from_higher; }
ShmNonce& ShmHandshake::answerer_nonce() const { return peer_->control().from_lower; }

bool ShmHandshake::reads_memory_of(const ShmGreeting& peer) const {
  ShmNonce found{};
  return peer_->pid > 0 && read_memory(peer_->pid, peer.probe, std::as_writable_bytes(std::span(found))) &&
         found == peer.nonce;
}

// A greeting, or nothing: then the stage says whether to wait or that it is over.
std::optional<ShmGreeting> ShmHandshake::receive(std::vector<UniqueFd>& descriptors) {
  ShmPacket packet;
  const ShmReceived received = receive_packet(fd(), packet);
  if (received == ShmReceived::kNothing) return std::nullopt;
  if (received == ShmReceived::kClosed) {
    fail("it closed the connection, or this process has no descriptors left");
    return std::nullopt;
  }
  descriptors = std::move(packet.descriptors);
  std::optional<ShmGreeting> greeting = decode_greeting(packet.bytes);
  if (!greeting) decline("it speaks another version");
  return greeting;
}

ShmGreeting ShmHandshake::greeting(ShmWord word) const {
  ShmGreeting greeting;
  greeting.word = word;
  greeting.from = static_cast<std::uint32_t>(self_->rank);
  greeting.to = static_cast<std::uint32_t>(peer_->rank);
  greeting.size = static_cast<std::uint32_t>(self_->size);
  greeting.ring_bytes = peer_->ring_bytes;
  greeting.nonce = nonce_;
  greeting.probe = reinterpret_cast<std::uint64_t>(peer_->probe.data());
  greeting.can_pull = peer_->can_pull;
  greeting.has_process = static_cast<bool>(self_->process);
  if (calls()) greeting.token = self_->job_token;  // to a process of this user, as was checked
  return greeting;
}

ShmSent ShmHandshake::send(ShmWord word, std::vector<int> descriptors) {
  return send_packet(fd(), encode_greeting(greeting(word)), descriptors);
}

std::vector<int> ShmHandshake::own_descriptors() const {
  std::vector<int> descriptors{self_->wakeup->doorbell(), self_->wakeup->presence_file()};
  if (self_->process) descriptors.push_back(self_->process.get());
  return descriptors;
}

void ShmHandshake::decline(std::string reason) {
  // Whether the word arrives or not, the other side sees the connection end.
  [[maybe_unused]] const ShmSent sent = send(ShmWord::kDecline);
  fail(std::move(reason));
}

void ShmHandshake::fail(std::string reason) {
  stage_ = Stage::kFailed;
  reason_ = std::move(reason);
  self_->wakeup->unwatch(*peer_);
  const int peer = peer_->rank;
  const bool caller = calls();
  peer_ = std::make_unique<ShmPeer>(peer, UniqueFd());
  if (caller) pair_file_.reset();
}

}  // namespace hvd
