// SHA-256 and HMAC-SHA-256, with which two ranks show each other that they hold the job token without sending it.
// Pure functions; any thread. Sources: FIPS 180-4, RFC 2104.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string_view>

namespace hvd {

using Digest = std::array<std::byte, 32>;

Digest sha256(std::span<const std::byte> bytes);
Digest hmac_sha256(std::string_view key, std::span<const std::byte> bytes);

/// Takes the same time wherever the two differ.
bool equal_in_constant_time(const Digest& a, const Digest& b);

}  // namespace hvd
