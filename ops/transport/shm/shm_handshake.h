// How two ranks of one host come to share memory: one calls the other's socket, says who it is and hands over the
// memory; both look up what the other wrote into it. Used at init, by the thread that calls it; nothing waits.
//
//   caller (higher rank)                                  answerer (lower rank)
//   hello: ranks, job token, nonce, descriptors    ->     maps the memory, finds the nonce in it
//   finds the answer's nonce in the memory         <-     accept: nonce, descriptors
//   commit                                         ->     both share
// Either may decline at any step, with a word or by closing; then both know that they do not share.
//
// On the way each tries to read the other's nonce in that one's own memory, past all that is shared. A kernel or a
// container may forbid that; bytes go through the rings then. The last word says what both found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/transport/shm/shm_greeting.h"
#include "ops/transport/shm/shm_peer.h"
#include "ops/transport/shm/shm_socket.h"
#include "ops/transport/shm/shm_wakeup.h"

namespace hvd {

/// What a rank brings to all its handshakes.
struct ShmSelf {
  int rank = 0;
  int size = 1;
  std::string job_token;
  std::size_t ring_bytes = 0;  ///< of the memory that this rank makes
  uid_t uid = 0;
  UniqueFd process;  ///< pidfd of this process; -1 before Linux 5.3
  std::unique_ptr<ShmWakeup> wakeup;
  std::vector<bool> awaited;  ///< by rank: its hello is still to come
};

class ShmHandshake {
 public:
  /// Towards the rank that listens at `name`. `self` must outlive the handshake.
  static ShmHandshake call(ShmSelf& self, int peer, std::string name);
  /// With whoever called; a hello of an awaited rank ends the wait for that rank.
  static ShmHandshake answer(ShmSelf& self, UniqueFd socket);

  /// Goes as far as it can without waiting.
  void advance();
  void give_up(std::string reason) { fail(std::move(reason)); }

  bool agreed() const { return stage_ == Stage::kAgreed; }
  bool ended() const { return agreed() || stage_ == Stage::kFailed; }
  /// Nothing to poll for: `advance` has to be tried again a little later.
  bool retries() const { return stage_ == Stage::kGreeting || stage_ == Stage::kAnswering; }
  bool calls() const { return !name_.empty(); }

  int fd() const { return peer_->socket.get(); }
  /// -1 for a stranger.
  int peer() const { return peer_->rank; }
  const std::string& reason() const { return reason_; }
  std::unique_ptr<ShmPeer> take_peer() { return std::move(peer_); }

 private:
  enum class Stage : std::uint8_t {
    kGreeting,        // caller
    kAwaitingAnswer,  // caller
    kAwaitingHello,   // answerer
    kAnswering,       // answerer
    kAwaitingCommit,  // answerer
    kAgreed,
    kFailed
  };

  ShmHandshake(ShmSelf& self, std::unique_ptr<ShmPeer> peer, Stage stage)
      : self_(&self), stage_(stage), peer_(std::move(peer)) {}

  void step();
  void greet();
  void take_answer();
  void take_hello();
  void send_answer();
  void take_commit();

  Status make_memory();
  Status adopt_memory(const ShmGreeting& hello, int file);
  Status adopt_descriptors(std::vector<UniqueFd> descriptors, bool has_process);
  std::string objection_to(const ShmGreeting& hello) const;
  ShmNonce& caller_nonce() const;
  ShmNonce& answerer_nonce() const;

  bool reads_memory_of(const ShmGreeting& peer) const;
  std::optional<ShmGreeting> receive(std::vector<UniqueFd>& descriptors);
  ShmGreeting greeting(ShmWord word) const;
  ShmSent send(ShmWord word, std::vector<int> descriptors = {});
  std::vector<int> own_descriptors() const;
  void decline(std::string reason);
  void fail(std::string reason);

  ShmSelf* self_;
  Stage stage_;
  std::unique_ptr<ShmPeer> peer_;
  std::string name_;    // caller: where the peer listens
  UniqueFd pair_file_;  // caller: the memory to hand over
  ShmNonce nonce_{};    // ours
  std::string reason_;  // why it failed
};

ShmNonce random_nonce();

}  // namespace hvd
