// Plays all blocks of a launch on the host: every element of every piece is visited once, and nothing wide is
// misaligned.
#include "ops/device/cuda/piece_walk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <vector>

namespace hvd::cuda {
namespace {

constexpr std::array kSizes{ElementBytes{1, 1}, ElementBytes{2, 2}, ElementBytes{4, 4},
                            ElementBytes{8, 8}, ElementBytes{2, 4}, ElementBytes{4, 2}};

/// Elements from `first` to before `last`.
struct Range {
  std::size_t first;
  std::size_t last;
};

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

DevicePiece piece_at(std::uintptr_t from, std::uintptr_t to, std::size_t count) {
  return {reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), count};
}

/// What one block visits, as the kernel does: head, vectors, tail.
void visit(const DevicePiece& piece, std::size_t block, ElementBytes bytes, std::vector<Range>& visited) {
  const PieceSplit split = split_piece(address(piece.from), address(piece.to), piece.count, bytes);
  const BlockPart part = part_of(block, piece.count, split, bytes);
  ASSERT_LE(part.first, part.last);
  ASSERT_LE((part.last - part.first) * split.lanes, tile_elements(bytes)) << "more than a block handles at once";
  ASSERT_LT(split.head, kThreads);
  ASSERT_LT(split.tail, kThreads);
  if (part.head && split.head > 0) visited.push_back({0, split.head});
  if (part.last > part.first) {
    const Range body{split.head + part.first * split.lanes, split.head + part.last * split.lanes};
    ASSERT_EQ((address(piece.to) + body.first * bytes.to) % (std::size_t{split.lanes} * bytes.to), 0u);
    if (piece.from != nullptr) {
      ASSERT_EQ((address(piece.from) + body.first * bytes.from) % (std::size_t{split.lanes} * bytes.from), 0u);
    }
    visited.push_back(body);
  }
  if (part.tail && split.tail > 0) visited.push_back({piece.count - split.tail, piece.count});
}

void expect_each_once(std::vector<Range> visited, std::size_t count) {
  std::ranges::sort(visited, {}, &Range::first);
  std::size_t next = 0;
  for (const Range& range : visited) {
    ASSERT_EQ(range.first, next);
    next = range.last;
  }
  ASSERT_EQ(next, count);
}

void expect_piece_is_covered(const DevicePiece& piece, ElementBytes bytes) {
  std::vector<Range> visited;
  for (std::size_t block = 0; block < blocks_of(piece.count, bytes); ++block) {
    ASSERT_NO_FATAL_FAILURE(visit(piece, block, bytes, visited));
  }
  ASSERT_NO_FATAL_FAILURE(expect_each_once(std::move(visited), piece.count));
}

std::vector<std::size_t> counts_to_try(ElementBytes bytes) {
  std::vector<std::size_t> counts{0, 1, 2, 3, 5, 7, 13, 31, 127, 1031, 65'537, 1'000'003};
  const std::size_t vector = 16 / bytes.wider();
  const std::size_t tile = tile_elements(bytes);
  for (const std::size_t edge : {vector, 2 * vector, tile, 3 * tile}) {
    for (const std::size_t count : {edge - 1, edge, edge + 1}) counts.push_back(count);
  }
  return counts;
}

TEST(PieceWalk, VisitsEveryElementOnceWhateverSizeAndAlignment) {
  for (const ElementBytes bytes : kSizes) {
    for (const std::size_t count : counts_to_try(bytes)) {
      for (std::uintptr_t from = 0; from <= 17; ++from) {
        for (std::uintptr_t to = 0; to <= 17; ++to) {
          if (count > 100'000 && (from + to) % 5 != 0) continue;
          const DevicePiece piece = piece_at(0x7000'0000 + from * bytes.from, 0x9000'0000 + to * bytes.to, count);
          ASSERT_NO_FATAL_FAILURE(expect_piece_is_covered(piece, bytes))
              << count << " elements of " << bytes.from << " to " << bytes.to << " bytes at " << from << ", " << to;
        }
      }
    }
  }
}

TEST(PieceWalk, NeedsOnlyTheTargetsAlignmentWhereNothingIsRead) {
  for (const ElementBytes bytes : kSizes) {
    for (std::uintptr_t to = 0; to <= 17; ++to) {
      const DevicePiece piece = piece_at(0, 0x9000'0000 + to * bytes.to, 1031);
      EXPECT_EQ(split_piece(0, address(piece.to), piece.count, bytes).lanes, wide_lanes(bytes));
      ASSERT_NO_FATAL_FAILURE(expect_piece_is_covered(piece, bytes));
    }
  }
}

TEST(PieceWalk, MovesSixteenBytesWhereAddressesAllowAndFourWhereTheyNearlyDo) {
  constexpr ElementBytes kHalf{2, 2};
  EXPECT_EQ(split_piece(0x1000, 0x2000, 1000, kHalf).lanes, 8u);
  EXPECT_EQ(split_piece(0x100e, 0x200e, 1000, kHalf).lanes, 8u);
  EXPECT_EQ(split_piece(0x100e, 0x200e, 1000, kHalf).head, 1u);
  EXPECT_EQ(split_piece(0x1004, 0x2000, 1000, kHalf).lanes, 2u);
  EXPECT_EQ(split_piece(0x1002, 0x2000, 1000, kHalf).lanes, 1u);
  EXPECT_EQ(split_piece(0x1008, 0x2010, 1000, ElementBytes{2, 4}).lanes, 4u);
  EXPECT_EQ(split_piece(0x1004, 0x2010, 1000, ElementBytes{2, 4}).lanes, 1u);
}

TEST(PieceWalk, HandlesPiecesOfMoreElementsThanFit32Bits) {
  for (const ElementBytes bytes : kSizes) {
    for (const std::size_t count : {(std::size_t{1} << 31) + 1, (std::size_t{1} << 32) + 7}) {
      const DevicePiece piece = piece_at(0x7000'0000'0000 + bytes.from, 0x7800'0000'0000 + bytes.to, count);
      ASSERT_NO_FATAL_FAILURE(expect_piece_is_covered(piece, bytes));
    }
  }
}

// ---- Whole launches ----

/// Fills tables as a launch does and plays all their blocks.
int play(const std::vector<DevicePiece>& pieces, ElementBytes bytes) {
  std::vector<std::vector<Range>> visited(pieces.size());
  std::vector<std::size_t> order;  // which piece each row of the table is
  PieceTable table;
  int launches = 0;
  const auto launch = [&] {
    ++launches;
    for (std::uint32_t block = 0; block < table.blocks; ++block) {
      const unsigned row = table.piece_of(block);
      ASSERT_LT(row, table.size);
      visit(table.pieces[row], block - table.first_block[row], bytes, visited[order[row]]);
    }
    table.size = table.blocks = 0;
    order.clear();
  };
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (!table.add(pieces[i], bytes)) {
      launch();
      EXPECT_TRUE(table.add(pieces[i], bytes));
    }
    if (pieces[i].count > 0) order.push_back(i);
  }
  if (table.blocks > 0) launch();
  for (std::size_t i = 0; i < pieces.size(); ++i) expect_each_once(visited[i], pieces[i].count);
  return launches;
}

TEST(PieceTable, GivesEachBlockItsPieceForRandomBatches) {
  const auto seed = std::random_device()();
  std::mt19937_64 random(seed);
  for (int round = 0; round < 200; ++round) {
    const ElementBytes bytes = kSizes[random() % kSizes.size()];
    std::vector<DevicePiece> pieces(random() % 300);
    for (DevicePiece& piece : pieces) {
      const std::size_t most = std::array{std::size_t{1}, std::size_t{20}, std::size_t{3000},
                                          3u * std::size_t{tile_elements(bytes)}}[random() % 4];
      piece = piece_at(0x7000'0000 + random() % 40 * bytes.from, 0x9000'0000 + random() % 40 * bytes.to,
                       random() % (most + 1));
    }
    const auto filled = static_cast<std::size_t>(
        std::ranges::count_if(pieces, [](const DevicePiece& piece) { return piece.count > 0; }));
    const std::size_t launches = (filled + PieceTable::kCapacity - 1) / PieceTable::kCapacity;
    ASSERT_EQ(play(pieces, bytes), static_cast<int>(launches)) << "round " << round << ", seed " << seed;
    ASSERT_FALSE(::testing::Test::HasFailure()) << "round " << round << ", seed " << seed;
  }
}

TEST(PieceTable, TakesAsManyPiecesAsItHasRowsForAndNoMoreBlocksThanALaunchHas) {
  constexpr ElementBytes kBytes{1, 1};
  PieceTable table;
  for (unsigned i = 0; i < PieceTable::kCapacity; ++i) ASSERT_TRUE(table.add(piece_at(0x1000, 0x2000, 1), kBytes));
  EXPECT_FALSE(table.add(piece_at(0x1000, 0x2000, 1), kBytes));
  EXPECT_TRUE(table.add(piece_at(0x1000, 0x2000, 0), kBytes)) << "nothing takes no row";

  table.size = table.blocks = 0;
  EXPECT_TRUE(table.add(piece_at(0x1000, 0x2000, PieceTable::most_elements(kBytes)), kBytes));
  EXPECT_EQ(table.blocks, PieceTable::kMaxBlocks);
  EXPECT_FALSE(table.add(piece_at(0x1000, 0x2000, 1), kBytes));
}

TEST(PieceTable, FitsTheParametersOfALaunch) { EXPECT_LE(sizeof(PieceTable) + sizeof(DeviceConversion), 4096u); }

}  // namespace
}  // namespace hvd::cuda
