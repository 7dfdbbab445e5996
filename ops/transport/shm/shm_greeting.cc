#include "ops/transport/shm/shm_greeting.h"

#include <cstring>
#include <type_traits>

namespace hvd {
namespace {

constexpr std::uint32_t kMagic = 0x53445648;  // "HVDS"
constexpr std::uint32_t kVersion = 2;

// As it travels; both ends are on one machine.
struct Wire {
  std::uint32_t magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t word = 0;
  std::uint32_t from = 0;
  std::uint32_t to = 0;
  std::uint32_t size = 0;
  std::uint64_t ring_bytes = 0;
  ShmNonce nonce{};
  std::uint64_t probe = 0;
  std::uint32_t can_pull = 0;
  std::uint32_t has_process = 0;
  std::uint32_t token_bytes = 0;
  std::uint32_t unused = 0;
};
static_assert(std::has_unique_object_representations_v<Wire>, "padding would leak what was in memory before");

}  // namespace

std::vector<std::byte> encode_greeting(const ShmGreeting& greeting) {
  Wire wire;
  wire.word = static_cast<std::uint32_t>(greeting.word);
  wire.from = greeting.from;
  wire.to = greeting.to;
  wire.size = greeting.size;
  wire.ring_bytes = greeting.ring_bytes;
  wire.nonce = greeting.nonce;
  wire.probe = greeting.probe;
  wire.can_pull = greeting.can_pull ? 1 : 0;
  wire.has_process = greeting.has_process ? 1 : 0;
  wire.token_bytes = static_cast<std::uint32_t>(greeting.token.size());
  std::vector<std::byte> bytes(sizeof wire + greeting.token.size());
  std::memcpy(bytes.data(), &wire, sizeof wire);
  std::memcpy(bytes.data() + sizeof wire, greeting.token.data(), greeting.token.size());
  return bytes;
}

std::optional<ShmGreeting> decode_greeting(std::span<const std::byte> bytes) {
  Wire wire;
  if (bytes.size() < sizeof wire) return std::nullopt;
  std::memcpy(&wire, bytes.data(), sizeof wire);
  const std::span<const std::byte> token = bytes.subspan(sizeof wire);
  const bool known_word = wire.word >= static_cast<std::uint32_t>(ShmWord::kHello) &&
                          wire.word <= static_cast<std::uint32_t>(ShmWord::kDecline);
  if (wire.magic != kMagic || wire.version != kVersion || !known_word || wire.token_bytes != token.size()) {
    return std::nullopt;
  }
  ShmGreeting greeting;
  greeting.word = static_cast<ShmWord>(wire.word);
  greeting.from = wire.from;
  greeting.to = wire.to;
  greeting.size = wire.size;
  greeting.ring_bytes = wire.ring_bytes;
  greeting.nonce = wire.nonce;
  greeting.probe = wire.probe;
  greeting.can_pull = wire.can_pull != 0;
  greeting.has_process = wire.has_process != 0;
  greeting.token.assign(reinterpret_cast<const char*>(token.data()), token.size());
  return greeting;
}

bool equal_in_constant_time(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  volatile unsigned char difference = 0;  // volatile: the loop must not end early
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference = static_cast<unsigned char>(difference | (static_cast<unsigned char>(a[i] ^ b[i])));
  }
  return difference == 0;
}

}  // namespace hvd
