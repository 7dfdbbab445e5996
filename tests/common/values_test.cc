// The small tools: statuses, guarded values, descriptors, counters, ranks as text, bytes on the wire.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>
#include <horovod_cpp/status.h>

#include "common/counter.h"
#include "common/guarded.h"
#include "common/rank_text.h"
#include "common/unique_fd.h"
#include "common/wire.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {
namespace {

// ---- Status
// ----------------------------------------------------------------------------------------------------------

TEST(Status, IsASuccessWithoutTextUntilItSaysOtherwise) {
  const Status good;
  EXPECT_TRUE(good.ok());
  EXPECT_TRUE(static_cast<bool>(good));
  EXPECT_EQ(good.text(), "");
  const Status bad = Status::unavailable("no such library");
  EXPECT_FALSE(bad.ok());
  EXPECT_EQ(bad.code(), StatusCode::kUnavailable);
  const Status copy = bad;
  EXPECT_EQ(&copy.text(), &bad.text()) << "copies share the text";
}

Result<int> half_of(int value) {
  if (value % 2 != 0) return Status::invalid_argument("odd");
  return value / 2;
}

Status quarter_of(int value, int& quarter) {
  Result<int> half = half_of(value);
  HVD_RETURN_IF_ERROR(half.status());
  Result<int> again = half_of(*half);
  HVD_RETURN_IF_ERROR(again.status());
  quarter = *again;
  return {};
}

TEST(Result, HoldsAValueOrTheReasonWhyThereIsNone) {
  EXPECT_TRUE(half_of(4).ok());
  EXPECT_EQ(half_of(4).value(), 2);
  EXPECT_TRUE(half_of(4).status().ok());
  EXPECT_EQ(half_of(3).status().text(), "odd");
  int quarter = 0;
  EXPECT_TRUE(quarter_of(8, quarter).ok());
  EXPECT_EQ(quarter, 2);
  EXPECT_EQ(quarter_of(6, quarter).code(), StatusCode::kInvalidArgument);
}

TEST(DataType, EveryRowIsFoundByItsNumberAndOthersAreNot) {
  for (const DataTypeInfo& row : kDataTypes) {
    EXPECT_EQ(name_of(row.type), row.name);
    EXPECT_EQ(size_of(row.type), row.bytes);
  }
  EXPECT_EQ(size_of(static_cast<DataType>(2)), 0u);
  EXPECT_EQ(name_of(static_cast<DataType>(200)), "unknown type");
  EXPECT_EQ(name_of(static_cast<ReduceOp>(6)), "unknown reduction");
  EXPECT_FALSE(is_valid(static_cast<ReduceOp>(6)));
}

// ---- Guarded, Counter, UniqueFd
// --------------------------------------------------------------------------------------

TEST(Guarded, LetsOneThreadInAtATime) {
  Guarded<int> count(0);
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (int k = 0; k < 1000; ++k) count.with([](int& value) { ++value; });
      });
    }
  }
  const Guarded<int>& readable = count;
  EXPECT_EQ(readable.with([](const int& value) { return value; }), 4000);
}

TEST(Counter, IsReadByOthersWhileItCounts) {
  Counter counter;
  std::jthread reader([&] {
    std::int64_t last = 0;
    while (last < 1000) {
      const std::int64_t now = counter.value();
      ASSERT_GE(now, last);
      last = now;
    }
  });
  for (int i = 0; i < 1000; ++i) counter.add(1);
  reader.join();
  const Counter copy = counter;
  EXPECT_EQ(copy.value(), 1000);
}

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

TEST(UniqueFd, ClosesWhatItOwnsOnce) {
  int raw = -1;
  {
    UniqueFd first(::open("/dev/null", O_RDONLY));
    raw = first.get();
    ASSERT_TRUE(is_open(raw));
    UniqueFd second(std::move(first));
    EXPECT_EQ(second.get(), raw);
    EXPECT_TRUE(is_open(raw));
    UniqueFd third(::open("/dev/null", O_RDONLY));
    const int other = third.get();
    third = std::move(second);
    EXPECT_FALSE(is_open(other)) << "what it had before was not closed";
    EXPECT_EQ(third.get(), raw);
  }
  EXPECT_FALSE(is_open(raw));
  UniqueFd none;
  EXPECT_FALSE(none);
  none.reset();
}

// ---- ranks as text
// ---------------------------------------------------------------------------------------------------

TEST(RankText, JoinsNeighbours) {
  EXPECT_EQ(rank_text(std::vector<int>{3}), "rank 3");
  EXPECT_EQ(rank_text(std::vector<int>{0, 1, 2}), "ranks 0-2");
  EXPECT_EQ(rank_text(std::vector<int>{0, 2, 3, 7}), "ranks 0,2-3,7");
  EXPECT_EQ(rank_text(std::vector<int>{0, 1, 3, 4, 5, 9}), "ranks 0-1,3-5,9");
}

// ---- the wire
// --------------------------------------------------------------------------------------------------------

TEST(Wire, ReadsWhatWasWritten) {
  WireWriter out;
  out.fixed(std::uint8_t{200});
  out.fixed(-1.5);
  for (const std::uint64_t value : {std::uint64_t{0}, std::uint64_t{127}, std::uint64_t{128}, std::uint64_t{300},
                                    std::uint64_t{1} << 35, ~std::uint64_t{0}}) {
    out.varint(value);
  }
  out.text("");
  out.text("täxt");
  out.integers({0, 1, -1, std::numeric_limits<std::int64_t>::min()});
  const std::vector<std::byte> bytes = out.take();
  WireReader in(bytes);
  EXPECT_EQ(in.fixed<std::uint8_t>(), 200);
  EXPECT_EQ(in.fixed<double>(), -1.5);
  EXPECT_EQ(in.varint(), 0u);
  EXPECT_EQ(in.varint(), 127u);
  EXPECT_EQ(in.varint(), 128u);
  EXPECT_EQ(in.varint(), 300u);
  EXPECT_EQ(in.varint(), std::uint64_t{1} << 35);
  EXPECT_EQ(in.varint(), ~std::uint64_t{0});
  EXPECT_EQ(in.text(), "");
  EXPECT_EQ(in.text(), "täxt");
  EXPECT_EQ(in.integers(), (std::vector<std::int64_t>{0, 1, -1, std::numeric_limits<std::int64_t>::min()}));
  EXPECT_TRUE(in.ok());
  EXPECT_TRUE(in.at_end());
  EXPECT_EQ(in.fixed<std::uint32_t>(), 0u) << "past the end";
  EXPECT_FALSE(in.ok());
}

TEST(Wire, SmallNumbersTakeOneByte) {
  WireWriter out;
  out.varint(127);
  EXPECT_EQ(out.take().size(), 1u);
}

std::vector<std::byte> raw(std::initializer_list<int> values) {
  std::vector<std::byte> bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}

TEST(Wire, RefusesWhatCannotBeTrue) {
  {
    const auto bytes = raw({0x80, 0x80});  // a number without an end
    WireReader in(bytes);
    EXPECT_EQ(in.varint(), 0u);
    EXPECT_FALSE(in.ok());
  }
  {
    const auto bytes = raw({0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01});  // longer than 64 bits
    WireReader in(bytes);
    EXPECT_EQ(in.varint(), 0u);
    EXPECT_FALSE(in.ok());
  }
  {
    const auto bytes = raw({0xff, 0xff, 0xff, 0xff, 0x7f, 1, 2});  // a count beyond what is left: nothing is allocated
    WireReader text(bytes);
    EXPECT_TRUE(text.text().empty());
    EXPECT_FALSE(text.ok());
    WireReader integers(bytes);
    EXPECT_TRUE(integers.integers().empty());
    EXPECT_FALSE(integers.ok());
    WireReader count(bytes);
    EXPECT_EQ(count.count(4), 0u);
    EXPECT_FALSE(count.ok());
  }
  {
    const auto bytes = raw({0x80, 0x02});  // 256
    WireReader in(bytes);
    EXPECT_EQ(in.number<std::uint8_t>(), 0);
    EXPECT_FALSE(in.ok());
  }
  {
    WireReader in(std::span<const std::byte>{});
    EXPECT_TRUE(in.text().empty());
    EXPECT_FALSE(in.ok());
    EXPECT_EQ(in.varint(), 0u);
    EXPECT_EQ(in.fixed<double>(), 0.0);
  }
}

TEST(Wire, RandomBytesAreReadWithinTheirBounds) {
  std::mt19937_64 random = generator_of_this_run();
  for (int round = 0; round < 5000; ++round) {
    std::vector<std::byte> bytes(random() % 40);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    WireReader in(bytes);
    for (int i = 0; i < 10; ++i) {
      switch (random() % 5) {
        case 0:
          EXPECT_LE(in.text().size(), bytes.size());
          break;
        case 1:
          EXPECT_LE(in.integers().size(), bytes.size());
          break;
        case 2:
          in.fixed<std::uint64_t>();
          break;
        case 3:
          in.number<std::uint16_t>();
          break;
        default:
          EXPECT_LE(in.count(3), bytes.size() / 3);
      }
    }
  }
}

}  // namespace
}  // namespace hvd::testing
