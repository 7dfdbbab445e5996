// What ranks of one host say to each other before they share memory. Pure functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ops/transport/shm/shm_peer.h"

namespace hvd {

enum class ShmWord : std::uint32_t {
  kHello = 1,    ///< caller: who it is, and memory for the pair
  kAccept = 2,   ///< answerer: the memory is mapped
  kCommit = 3,   ///< caller: both share from now on
  kDecline = 4,  ///< either: they do not
};

struct ShmGreeting {
  ShmWord word = ShmWord::kHello;
  std::uint32_t from = 0;  ///< global ranks
  std::uint32_t to = 0;
  std::uint32_t size = 0;
  std::uint64_t ring_bytes = 0;
  ShmNonce nonce{};          ///< what the sender wrote into the memory
  std::uint64_t probe = 0;   ///< where the nonce lies in the sender's own memory, for the other one to try to read it
  bool can_pull = false;     ///< the sender has read the other's; in the caller's last word: both have
  bool has_process = false;  ///< a pidfd is among the descriptors
  std::string token;         ///< of the job; the caller's only
};

inline constexpr std::size_t kMaxTokenBytes = 4096;

std::vector<std::byte> encode_greeting(const ShmGreeting& greeting);
/// Nothing when the bytes are no greeting of this version.
std::optional<ShmGreeting> decode_greeting(std::span<const std::byte> bytes);

/// Takes the same time wherever the first difference is.
bool equal_in_constant_time(std::string_view a, std::string_view b);

}  // namespace hvd
