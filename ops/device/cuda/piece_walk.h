// How one launch divides its pieces: which block handles which part of which piece, and which elements of a part move
// many at a time.
// Pure functions: every thread of the kernel runs them, the thread that launches it, and tests without any device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/device/cuda/host_device.h"
#include "ops/device/device_runtime.h"

namespace hvd::cuda {

inline constexpr unsigned kThreads = 256;
inline constexpr unsigned kUnroll = 4;
/// What one block moves, in bytes of the wider type: kUnroll accesses of 16 bytes by each thread. All its loads are in
/// flight at once, and the hardware hands out blocks as others end, which balances pieces of any sizes.
inline constexpr std::size_t kTileBytes = std::size_t{kThreads} * kUnroll * 16;

/// Sizes of one element on both sides; powers of two up to 8.
struct ElementBytes {
  unsigned from;
  unsigned to;

  HVD_HOST_DEVICE constexpr unsigned wider() const { return from > to ? from : to; }
};

HVD_HOST_DEVICE constexpr unsigned tile_elements(ElementBytes bytes) {
  return static_cast<unsigned>(kTileBytes) / bytes.wider();
}

/// Elements that move together where addresses allow `vector_bytes` on the wider side; 1: one at a time.
HVD_HOST_DEVICE constexpr unsigned lanes_of(unsigned vector_bytes, ElementBytes bytes) {
  return vector_bytes > bytes.wider() ? vector_bytes / bytes.wider() : 1;
}
HVD_HOST_DEVICE constexpr unsigned wide_lanes(ElementBytes bytes) { return lanes_of(16, bytes); }
/// For views whose two addresses differ by some elements, so that no 16 bytes begin together.
HVD_HOST_DEVICE constexpr unsigned narrow_lanes(ElementBytes bytes) { return lanes_of(4, bytes); }

/// A piece is `head` elements, then `vectors` of `lanes` elements each, then `tail` elements. The vectors are aligned
/// to their size on both sides; head and tail are shorter than a vector.
struct PieceSplit {
  unsigned lanes = 1;
  unsigned head = 0;
  unsigned tail = 0;
  std::size_t vectors = 0;
};

/// Both addresses are multiples of their element's size; from == 0 means that nothing is read.
HVD_HOST_DEVICE constexpr PieceSplit split_piece(std::uintptr_t from, std::uintptr_t to, std::size_t count,
                                                 ElementBytes bytes) {
  // In elements, modulo the lanes: a vector begins where this is zero, and must do so on both sides at once.
  const std::uintptr_t to_index = to / bytes.to;
  const std::uintptr_t apart = from == 0 ? 0 : to_index - from / bytes.from;
  PieceSplit split;
  split.lanes = wide_lanes(bytes);
  if (apart % split.lanes != 0) split.lanes = narrow_lanes(bytes);
  if (apart % split.lanes != 0) split.lanes = 1;
  const std::size_t head = (split.lanes - to_index % split.lanes) % split.lanes;
  split.head = static_cast<unsigned>(head < count ? head : count);
  split.vectors = (count - split.head) / split.lanes;
  split.tail = static_cast<unsigned>((count - split.head) % split.lanes);
  return split;
}

HVD_HOST_DEVICE constexpr std::size_t blocks_of(std::size_t count, ElementBytes bytes) {
  return count / tile_elements(bytes) + (count % tile_elements(bytes) != 0 ? 1 : 0);
}

/// What one block does: the vectors from `first` to before `last`, and perhaps the ends of the piece.
struct BlockPart {
  std::size_t first = 0;
  std::size_t last = 0;
  bool head = false;
  bool tail = false;
};

/// `block` counts within the piece, from 0 to blocks_of(count) - 1. All blocks but the last few have a full tile.
HVD_HOST_DEVICE constexpr BlockPart part_of(std::size_t block, std::size_t count, const PieceSplit& split,
                                            ElementBytes bytes) {
  const std::size_t per_block = tile_elements(bytes) / split.lanes;
  const std::size_t first = block * per_block;
  const std::size_t last = first + per_block;
  BlockPart part;
  part.first = first < split.vectors ? first : split.vectors;
  part.last = last < split.vectors ? last : split.vectors;
  part.head = block == 0;
  part.tail = block + 1 == blocks_of(count, bytes);
  return part;
}

/// The pieces of one launch, passed to the kernel by value: no copy to the device precedes it, and a graph that
/// captures the launch has its own. With everything else it has to stay within the 4 KB of parameters that every CUDA
/// takes.
struct PieceTable {
  static constexpr unsigned kCapacity = 128;
  static constexpr std::uint32_t kMaxBlocks = 0x7fff'ffff;

  DevicePiece pieces[kCapacity];
  std::uint32_t first_block[kCapacity] = {};  ///< of the launch, for each piece
  std::uint32_t size = 0;
  std::uint32_t blocks = 0;

  /// False: full. A piece without elements takes no place. `count` is at most most_elements().
  constexpr bool add(const DevicePiece& piece, ElementBytes bytes) {
    const std::size_t more = blocks_of(piece.count, bytes);
    if (more == 0) return true;
    if (size == kCapacity || more > kMaxBlocks - blocks) return false;
    pieces[size] = piece;
    first_block[size] = blocks;
    ++size;
    blocks += static_cast<std::uint32_t>(more);
    return true;
  }

  static constexpr std::size_t most_elements(ElementBytes bytes) {
    return std::size_t{kMaxBlocks} * tile_elements(bytes);
  }

  /// The piece that this block of the launch works on.
  HVD_HOST_DEVICE constexpr unsigned piece_of(std::uint32_t block) const {
    unsigned low = 0;  // first_block[low] <= block, and block < first_block[high] where there is one
    unsigned high = size;
    while (high - low > 1) {
      const unsigned middle = (low + high) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

}  // namespace hvd::cuda
