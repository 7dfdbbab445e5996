// Blocks of ranks on ordinary memory: what is found when, and which slot is free. How sleepers are woken is of the
// transports (transport_conformance_test.cc).

#include "ops/transport/shared_blocks.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>

#include "common/loop/loop.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

constexpr std::size_t kTestSlotBytes = 256;

class SharedBlocksTest : public ::testing::Test {
 protected:
  explicit SharedBlocksTest(int size = 3) {
    for (int rank = 0; rank < size; ++rank) {
      memory_.emplace_back(new (std::align_val_t(64)) std::byte[block_bytes(kTestSlotBytes)]);
      std::construct_at(reinterpret_cast<BlockWords*>(memory_.back().get()));
    }
    for (int rank = 0; rank < size; ++rank) {
      blocks_.emplace_back(rank, size, kTestSlotBytes);
      for (int peer = 0; peer < size; ++peer) {
        blocks_.back().add(peer, {memory_[static_cast<std::size_t>(peer)].get(), block_bytes(kTestSlotBytes)});
      }
    }
  }

  SharedBlocks& rank(int rank) { return blocks_[static_cast<std::size_t>(rank)]; }

  // All ranks but `self`.
  std::vector<int> others(int self) const {
    std::vector<int> ranks;
    for (int peer = 0; peer < static_cast<int>(blocks_.size()); ++peer) {
      if (peer != self) ranks.push_back(peer);
    }
    return ranks;
  }
  bool enter_and_claim(int self, std::uint64_t call) {
    return rank(self).enter(call, others(self)) && !rank(self).claim();
  }
  TransferRef await(int self, int peer, std::uint64_t call, BlockStage stage) {
    auto transfer = std::make_shared<Transfer>(loop_, 0);
    transfer->direction = Transfer::Direction::kReceive;
    transfer->peer = peer;
    transfer->notice = BlockNotice{call, stage};
    rank(self).await(transfer);
    return transfer;
  }

  struct Delete {
    void operator()(std::byte* place) const { ::operator delete[](place, std::align_val_t(64)); }
  };
  std::deque<std::unique_ptr<std::byte, Delete>> memory_;
  std::deque<SharedBlocks> blocks_;
  SteadyClock clock_;
  Loop loop_{clock_};
};

TEST_F(SharedBlocksTest, WhatIsShownIsFoundByWhoIsInTheCallFromItsStageOn) {
  ASSERT_TRUE(enter_and_claim(0, 7));
  ASSERT_TRUE(enter_and_claim(1, 7));
  EXPECT_EQ(rank(1).find(0, BlockStage::kOperand), nullptr);
  std::memcpy(rank(0).slot(), "operand", 8);
  rank(0).show(BlockStage::kOperand);
  ASSERT_NE(rank(1).find(0, BlockStage::kOperand), nullptr);
  EXPECT_STREQ(reinterpret_cast<const char*>(rank(1).find(0, BlockStage::kOperand)), "operand");
  EXPECT_EQ(rank(1).find(0, BlockStage::kSum), nullptr);
  rank(0).show(BlockStage::kSum);
  EXPECT_EQ(rank(1).find(0, BlockStage::kSum), rank(1).find(0, BlockStage::kOperand));
  EXPECT_EQ(rank(1).find(2, BlockStage::kOperand), nullptr) << "that rank has shown nothing";
  ASSERT_TRUE(enter_and_claim(2, 8));
  EXPECT_EQ(rank(2).find(0, BlockStage::kOperand), nullptr) << "of another call";
}

TEST_F(SharedBlocksTest, WhoComesLateFindsWhatWasShownBefore) {
  ASSERT_TRUE(enter_and_claim(0, 7));
  rank(0).show(BlockStage::kOperand);
  EXPECT_FALSE(rank(0).is_in_call(1)) << "it need not be woken";
  ASSERT_TRUE(enter_and_claim(1, 7));
  EXPECT_TRUE(rank(0).is_in_call(1));
  EXPECT_NE(rank(1).find(0, BlockStage::kOperand), nullptr);
}

TEST_F(SharedBlocksTest, ARankIsInOneCallAtATime) {
  ASSERT_TRUE(rank(0).enter(7, others(0)));
  EXPECT_FALSE(rank(0).enter(8, others(0)));
  rank(0).leave();
  EXPECT_TRUE(rank(0).enter(8, others(0)));
}

TEST_F(SharedBlocksTest, ASlotStaysAsItIsWhileAReaderIsInItsCall) {
  for (const int each : {0, 1, 2}) {
    ASSERT_TRUE(enter_and_claim(each, 1));
    rank(each).show(BlockStage::kSum);
  }
  const std::byte* const first = rank(1).find(0, BlockStage::kSum);
  rank(0).leave();
  rank(2).leave();
  // Rank 1 still reads: the other slot is taken, twice, as its readers have left it.
  for (const std::uint64_t call : {2u, 3u}) {
    ASSERT_TRUE(enter_and_claim(0, call));
    rank(0).show(BlockStage::kOperand);
    EXPECT_EQ(rank(1).find(0, BlockStage::kSum), first);
    rank(0).leave();
  }
  // A reader of the other slot too: there is none to take, until one of them leaves.
  ASSERT_TRUE(rank(2).enter(3, others(2)));
  ASSERT_TRUE(rank(0).enter(4, others(0)));
  const std::optional<int> reader = rank(0).claim();
  ASSERT_TRUE(reader.has_value());
  const TransferRef left = await(0, *reader, 4, BlockStage::kSlotFree);
  EXPECT_FALSE(left->done());
  EXPECT_FALSE(rank(0).has_news());
  EXPECT_TRUE(rank(1).wants_slot(0)) << "who leaves has to wake it";
  rank(3 - *reader).leave();  // whichever of the two it is
  EXPECT_TRUE(rank(0).has_news());
  EXPECT_TRUE(rank(0).deliver());
  EXPECT_TRUE(left->done());
  EXPECT_FALSE(rank(0).claim().has_value());
  EXPECT_FALSE(rank(1).wants_slot(0));
}

TEST_F(SharedBlocksTest, WhatWasTakenBackIsNotFoundByWhoEntersLater) {
  ASSERT_TRUE(enter_and_claim(0, 1));
  rank(0).show(BlockStage::kOperand);
  rank(0).leave();  // given up before the others began it
  ASSERT_TRUE(enter_and_claim(0, 2));
  ASSERT_TRUE(rank(1).enter(1, others(1)));
  EXPECT_EQ(rank(1).find(0, BlockStage::kOperand), nullptr);
}

TEST_F(SharedBlocksTest, WhoHasEndedReadsNothingAnyMore) {
  for (const std::uint64_t call : {1u, 2u}) {
    ASSERT_TRUE(enter_and_claim(0, call));
    rank(0).show(BlockStage::kOperand);
    rank(0).leave();
    const int reader = call == 1 ? 1 : 2;
    ASSERT_TRUE(rank(reader).enter(call, others(reader)));  // where it ends
  }
  ASSERT_TRUE(rank(0).enter(3, others(0)));
  ASSERT_TRUE(rank(0).claim().has_value());
  rank(0).gone(2);
  EXPECT_FALSE(rank(0).claim().has_value());
}

TEST_F(SharedBlocksTest, WhatIsAwaitedEndsOnceWhenItHasComeOrItsPeerHasEnded) {
  ASSERT_TRUE(enter_and_claim(0, 1));
  ASSERT_TRUE(enter_and_claim(1, 1));
  const TransferRef sum = await(0, 1, 1, BlockStage::kSum);
  const TransferRef cancelled = await(0, 1, 1, BlockStage::kOperand);
  const TransferRef of_other = await(0, 2, 1, BlockStage::kOperand);
  EXPECT_FALSE(rank(0).deliver());
  rank(0).cancel(cancelled);
  rank(1).show(BlockStage::kOperand);
  EXPECT_FALSE(rank(0).has_news());
  rank(1).show(BlockStage::kSum);
  EXPECT_TRUE(rank(0).has_news());
  EXPECT_TRUE(rank(0).deliver());
  EXPECT_TRUE(sum->done() && sum->status().ok());
  EXPECT_FALSE(cancelled->done());
  rank(0).end(2, Status::internal("rank 2 has ended"));
  EXPECT_EQ(of_other->status().text(), "rank 2 has ended");
  EXPECT_FALSE(rank(0).deliver());
  EXPECT_TRUE(await(0, 1, 1, BlockStage::kSum)->done()) << "it is there already";
}

// Calls of changing members on as many threads: each finds what the others have shown for it, whole, or waits.
class SharedBlocksOnThreads : public SharedBlocksTest {
 protected:
  SharedBlocksOnThreads() : SharedBlocksTest(4) {}

  struct Call {
    std::uint64_t number;
    std::vector<int> members;
  };

  static std::byte content(std::uint64_t call, int rank) {
    return static_cast<std::byte>(call * 31 + static_cast<std::uint64_t>(rank) * 7 + 1);
  }

  void take_part(int self, const Call& call, std::minstd_rand& random, std::atomic<int>& wrong) {
    SharedBlocks& own = rank(self);
    std::vector<int> peers = call.members;
    std::erase(peers, self);
    if (!own.enter(call.number, peers)) ++wrong;
    while (own.claim()) std::this_thread::yield();
    std::memset(own.slot(), static_cast<int>(content(call.number, self)), kTestSlotBytes);
    own.show(BlockStage::kOperand);
    if (random() % 4 == 0) std::this_thread::yield();
    for (const int peer : peers) {
      const std::byte* place = nullptr;
      while ((place = own.find(peer, BlockStage::kOperand)) == nullptr) std::this_thread::yield();
      for (std::size_t i = 0; i < kTestSlotBytes; ++i) {
        if (place[i] != content(call.number, peer)) ++wrong;
      }
    }
    own.leave();
  }
};

TEST_F(SharedBlocksOnThreads, NoReaderSeesAnythingButWhatBelongsToItsCall) {
  std::mt19937_64 random = generator_of_this_run();
  std::vector<Call> calls;
  for (std::uint64_t number = 1; number <= 3000; ++number) {
    Call call{number, {}};
    while (call.members.size() < 2) {
      call.members.clear();
      for (int rank = 0; rank < 4; ++rank) {
        if (random() % 3 != 0) call.members.push_back(rank);
      }
    }
    calls.push_back(std::move(call));
  }
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (int self = 0; self < 4; ++self) {
      threads.emplace_back([&, self, seed = random()] {
        std::minstd_rand own(static_cast<std::uint32_t>(seed));
        for (const Call& call : calls) {
          if (std::find(call.members.begin(), call.members.end(), self) == call.members.end()) continue;
          take_part(self, call, own, wrong);
        }
      });
    }
  }
  EXPECT_EQ(wrong.load(), 0);
}

}  // namespace
}  // namespace hvd::testing
