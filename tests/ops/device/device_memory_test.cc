// What the pool of device memory keeps, and gives out again.
#include "ops/device/device_memory.h"

#include <random>

#include <gtest/gtest.h>

#include "tests/support/fake_device.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

class DeviceMemoryTest : public ::testing::Test {
 protected:
  std::size_t leased(std::size_t bytes) { return memory_.lease(0, bytes, stream_).value()->bytes; }
  std::size_t allocations() const { return device_.counts().allocations; }

  FakeDevice device_;
  DeviceStream stream_ = device_.create_stream(0).value();
  DeviceMemory memory_{device_};
};

TEST_F(DeviceMemoryTest, ABlockServesWhatNeedsAtLeastHalfOfIt) {
  EXPECT_EQ(leased(4 * kMiB), 4 * kMiB);
  EXPECT_EQ(leased(3 * kMiB), 4 * kMiB);
  EXPECT_EQ(leased(2 * kMiB), 4 * kMiB);
  EXPECT_EQ(allocations(), 1U);
  EXPECT_EQ(leased(2 * kMiB - 1024 * 1024), kMiB) << "less than half of it";
  EXPECT_EQ(allocations(), 2U);
}

TEST_F(DeviceMemoryTest, TheBlockThatFitsBestIsTaken) {
  {
    const auto large = memory_.lease(0, 3 * kMiB, stream_).value();
    const auto small = memory_.lease(0, 2 * kMiB, stream_).value();
  }
  EXPECT_EQ(leased(2 * kMiB), 2 * kMiB);
  EXPECT_EQ(leased(2 * kMiB + 1), 3 * kMiB);
  EXPECT_EQ(allocations(), 2U);
}

TEST_F(DeviceMemoryTest, ABlockInUseServesNobodyElse) {
  const auto one = memory_.lease(0, 2 * kMiB, stream_).value();
  const auto other = memory_.lease(0, 2 * kMiB, stream_).value();
  EXPECT_NE(one->memory, other->memory);
}

TEST_F(DeviceMemoryTest, SizesThatDifferFromStepToStepSettleOnAFewBlocks) {
  std::mt19937_64 random = generator_of_this_run();
  for (int step = 0; step < 2000; ++step) leased(kMiB + random() % (7 * kMiB));
  const std::size_t settled = allocations();
  for (int step = 0; step < 2000; ++step) leased(kMiB + random() % (7 * kMiB));
  EXPECT_LE(allocations(), settled + 3) << "in each of three octaves a larger one than ever before may come";
  EXPECT_LT(device_.counts().bytes, 64 * kMiB);
}

TEST_F(DeviceMemoryTest, PinnedMemoryIsGivenOutAgainToo) {
  const std::byte* const first = memory_.lease_pinned(4 * kMiB).value().get();
  EXPECT_EQ(memory_.lease_pinned(2 * kMiB).value().get(), first);
  EXPECT_NE(memory_.lease_pinned(kMiB).value().get(), first);
  EXPECT_EQ(memory_.lease_pinned(4 * kMiB).value().get(), first) << "it is still known by its size";
}

}  // namespace
}  // namespace hvd::testing
