// Copies a dense tensor between its own order in memory and C order.
// Pure; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ops/memory_order.h"

namespace hvd {

/// `from` lies in `order`, which `memory_order` has given for `shape`; `to` gets the tensor in C order.
void copy_to_c_order(const std::byte* from, MemoryOrder order, std::byte* to, std::span<const std::int64_t> shape,
                     std::size_t element_bytes);

/// The other way round.
void copy_from_c_order(const std::byte* from, std::byte* to, MemoryOrder order, std::span<const std::int64_t> shape,
                       std::size_t element_bytes);

}  // namespace hvd
