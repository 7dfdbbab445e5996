// Which chunk goes where on a ring, and where chunks begin: pure functions, any thread.
// chunk: one rank's share of a buffer; a ring of p ranks has p chunks.
#pragma once

#include <cstddef>
#include <vector>

namespace hvd {

/// `value` modulo `size`, for values down to -size.
constexpr int wrap(int value, int size) { return (value + size) % size; }

struct RingStep {
  int send_chunk;
  int receive_chunk;
};

/// Step k of size-1: afterwards `rank` has the whole sum of chunk rank+1.
constexpr RingStep reduce_scatter_step(int rank, int size, int k) {
  return {wrap(rank - k, size), wrap(rank - k - 1, size)};
}

/// Step k of size-1, from there: every rank ends with every chunk.
constexpr RingStep allgather_step(int rank, int size, int k) {
  return {wrap(rank + 1 - k, size), wrap(rank - k, size)};
}

/// First element of slice `index` when `count` elements are cut in `parts` slices that differ by at most one.
constexpr std::size_t slice_begin(std::size_t count, int parts, int index) {
  const auto p = static_cast<std::size_t>(parts);
  const auto i = static_cast<std::size_t>(index);
  return count / p * i + (count % p < i ? count % p : i);
}

/// Byte offsets of the chunks of one tensor: parts + 1 of them.
std::vector<std::size_t> chunk_bounds(std::size_t count, std::size_t element_bytes, int parts);

}  // namespace hvd
