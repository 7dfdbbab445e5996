// The CUDA runtime on a real GPU: conversions against scale() and divide() of the host, order of streams, memory, and
// how fast pieces move. Skipped where there is no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ops/device/device_loader.h"
#include "ops/reduce/reducer.h"

namespace hvd {
namespace {

using std::chrono::steady_clock;
using Bytes = std::vector<unsigned char>;

constexpr int kDevice = 0;

class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const Result<DeviceRuntime*> loaded = load_device_runtime();
    if (!loaded) GTEST_SKIP() << loaded.status().text();
    gpu_ = loaded.value();
    stream_ = *gpu_->create_stream(kDevice);
    event_ = *gpu_->create_event(kDevice);
  }
  void TearDown() override {
    if (gpu_ == nullptr) return;
    wait_for_stream();
    for (void* memory : memory_) gpu_->free(kDevice, memory);
    for (void* memory : pinned_) gpu_->free_pinned(memory);
    gpu_->destroy_event(kDevice, event_);
    gpu_->destroy_stream(kDevice, stream_);
  }

  void check(const Status& status) { ASSERT_TRUE(status.ok()) << status.text(); }

  bool wait_for(DeviceEvent event) {
    const auto deadline = steady_clock::now() + std::chrono::seconds(30);
    while (steady_clock::now() < deadline) {
      Result<bool> done = gpu_->query(kDevice, event);
      if (!done) {
        ADD_FAILURE() << done.status().text();
        return false;
      }
      if (*done) return true;
      std::this_thread::yield();
    }
    ADD_FAILURE() << "the device is not done after 30 s";
    return false;
  }
  void wait_for_stream() {
    check(gpu_->record(kDevice, event_, stream_));
    wait_for(event_);
  }

  unsigned char* device_memory(std::size_t bytes) {
    Result<void*> memory = gpu_->allocate(kDevice, bytes);
    if (!memory) throw std::runtime_error(memory.status().text());
    memory_.push_back(*memory);
    return static_cast<unsigned char*>(*memory);
  }
  unsigned char* pinned_memory(std::size_t bytes) {
    Result<void*> memory = gpu_->allocate_pinned(bytes);
    if (!memory) throw std::runtime_error(memory.status().text());
    pinned_.push_back(*memory);
    return static_cast<unsigned char*>(*memory);
  }

  DeviceRuntime* gpu_ = nullptr;
  DeviceStream stream_ = nullptr;
  DeviceEvent event_ = nullptr;
  std::vector<void*> memory_;
  std::vector<void*> pinned_;
};

// ---- Conversions ----

/// A piece by places within the two buffers.
struct Place {
  bool fills;
  std::size_t from;
  std::size_t to;
  std::size_t count;
};

void convert_on_host(const DeviceConversion& conversion, const Place& place, const Bytes& from, Bytes& to) {
  const std::size_t from_bytes = size_of(conversion.from_type);
  const std::size_t to_bytes = size_of(conversion.to_type);
  if (place.fills) {
    for (std::size_t i = 0; i < place.count; ++i) std::memcpy(&to[place.to + i * to_bytes], &conversion.fill, to_bytes);
    return;
  }
  if (place.count == 0) return;
  Bytes elements(from.begin() + static_cast<std::ptrdiff_t>(place.from),
                 from.begin() + static_cast<std::ptrdiff_t>(place.from + place.count * from_bytes));
  ASSERT_TRUE(scale(elements.data(), conversion.from_type, place.count, conversion.factor).ok());
  ASSERT_TRUE(divide(elements.data(), conversion.from_type, place.count, conversion.divisor).ok());
  for (std::size_t i = 0; i < place.count; ++i) {
    if (from_bytes == to_bytes) {
      std::memcpy(&to[place.to + i * to_bytes], &elements[i * from_bytes], to_bytes);
    } else if (to_bytes == 4) {
      std::int16_t narrow;
      std::memcpy(&narrow, &elements[i * 2], 2);
      const std::int32_t wide = narrow;
      std::memcpy(&to[place.to + i * 4], &wide, 4);
    } else {
      std::memcpy(&to[place.to + i * 2], &elements[i * 4], 2);  // the lower half
    }
  }
}

class OnGpuConvert : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (gpu_ == nullptr) return;
    source_ = device_memory(kBytes);
    target_ = device_memory(kBytes);
    staging_ = pinned_memory(kBytes);
    random_bytes_.resize(kBytes);
    for (unsigned char& byte : random_bytes_) byte = static_cast<unsigned char>(random_());
    // Many NaNs, infinities, zeros and subnormals of every type.
    for (std::size_t at = 0; at + 64 < kBytes; at += 256) {
      std::memset(&random_bytes_[at], random_() % 2 == 0 ? 0 : 0xff, 16);
      constexpr std::array<std::uint64_t, 4> kSpecial{0x7ff0'0000'0000'0000, 0x7f80'0000'7f80'0001,
                                                      0x7c00'7c01'fc00'fc01, 0x7f80'7f81'ff80'0001};
      std::memcpy(&random_bytes_[at + 16], kSpecial.data(), sizeof kSpecial);
    }
  }

  void to_device(unsigned char* place, const Bytes& bytes) {
    std::memcpy(staging_, bytes.data(), bytes.size());
    check(gpu_->copy(kDevice, place, staging_, bytes.size(), stream_));
    wait_for_stream();
  }
  Bytes from_device(const unsigned char* place) {
    check(gpu_->copy(kDevice, staging_, place, kBytes, stream_));
    wait_for_stream();
    return Bytes(staging_, staging_ + kBytes);
  }

  std::vector<Place> random_places(const DeviceConversion& conversion, bool in_place) {
    const std::size_t from_bytes = size_of(conversion.from_type);
    const std::size_t to_bytes = size_of(conversion.to_type);
    std::vector<Place> places;
    std::size_t from = 0;
    std::size_t to = 0;
    for (int i = 0; i < 150; ++i) {
      const std::size_t most = std::array{0u, 3u, 40u, 1000u, 20'000u}[random_() % 5];
      Place place{random_() % 8 == 0, from + random_() % 20 * from_bytes, to + random_() % 20 * to_bytes,
                  random_() % (most + 1)};
      if (random_() % 2 == 0) {  // often aligned, as tensors are
        place.from = (place.from + 15) / 16 * 16;
        place.to = (place.to + 15) / 16 * 16;
      }
      if (in_place) place.from = place.to;
      from = place.from + place.count * from_bytes;
      to = place.to + place.count * to_bytes;
      if (from > kBytes || to > kBytes) break;
      places.push_back(place);
    }
    return places;
  }

  void expect_as_on_host(const DeviceConversion& conversion, bool in_place) {
    const std::vector<Place> places = random_places(conversion, in_place);
    unsigned char* source = in_place ? target_ : source_;
    std::vector<DevicePiece> pieces;
    Bytes expected = random_bytes_;
    for (const Place& place : places) {
      pieces.push_back({place.fills ? nullptr : source + place.from, target_ + place.to, place.count});
      convert_on_host(conversion, place, random_bytes_, expected);
    }
    to_device(source_, random_bytes_);
    to_device(target_, random_bytes_);
    check(gpu_->convert(kDevice, conversion, pieces, stream_));
    const Bytes got = from_device(target_);
    const auto [wrong, right] = std::mismatch(got.begin(), got.end(), expected.begin());
    const auto at = static_cast<std::size_t>(wrong - got.begin()) / 8 * 8;
    ASSERT_TRUE(wrong == got.end()) << name_of(conversion.from_type) << " to " << name_of(conversion.to_type)
                                    << " times " << conversion.factor << " by " << conversion.divisor
                                    << (in_place ? " in place" : "") << ": bytes from " << at << " are " << hex(got, at)
                                    << ", should be " << hex(expected, at) << ", were " << hex(random_bytes_, at);
  }

  static std::string hex(const Bytes& bytes, std::size_t at) {
    std::string text;
    for (std::size_t i = at; i < at + 8; ++i) {
      std::array<char, 4> digits{};
      std::snprintf(digits.data(), digits.size(), "%02x ", bytes[i]);
      text += digits.data();
    }
    return text;
  }

  static constexpr std::size_t kBytes = std::size_t{4} << 20;
  unsigned char* source_ = nullptr;
  unsigned char* target_ = nullptr;
  unsigned char* staging_ = nullptr;
  Bytes random_bytes_;
  std::mt19937_64 random_{7};
};

TEST_F(OnGpuConvert, GivesTheBitsOfTheHost) {
  for (const DataTypeInfo& row : kDataTypes) {
    for (const double factor : {1.0, 1.0 / 3.0, -3e30, 0.5, std::numeric_limits<double>::quiet_NaN(),
                                std::numeric_limits<double>::infinity()}) {
      for (const int divisor : {1, 3, 8, 65'537}) {
        for (const bool in_place : {false, true}) {
          const DeviceConversion conversion{row.type, row.type, factor, divisor, 0x1122'3344'5566'7788};
          ASSERT_NO_FATAL_FAILURE(expect_as_on_host(conversion, in_place));
        }
      }
    }
  }
}

TEST_F(OnGpuConvert, WidensAndNarrowsIntegers) {
  for (const double factor : {1.0, 0.3}) {
    for (const int divisor : {1, 3}) {
      ASSERT_NO_FATAL_FAILURE(
          expect_as_on_host({DataType::kInt16, DataType::kInt32, factor, divisor, 0x0102'0304}, /*in_place=*/false));
      ASSERT_NO_FATAL_FAILURE(
          expect_as_on_host({DataType::kInt32, DataType::kInt16, factor, divisor, 0x0102}, /*in_place=*/false));
    }
  }
}

TEST_F(OnGpuConvert, RefusesWhatItCannotDo) {
  const std::array pieces{DevicePiece{source_, target_, 4}};
  const std::array odd{DevicePiece{source_ + 2, target_, 4}};
  EXPECT_FALSE(gpu_->convert(kDevice, {DataType::kFloat32, DataType::kInt32, 1, 1, 0}, pieces, stream_).ok());
  EXPECT_FALSE(gpu_->convert(kDevice, {DataType::kFloat32, DataType::kFloat32, 1, 0, 0}, pieces, stream_).ok());
  EXPECT_FALSE(gpu_->convert(kDevice, {DataType::kFloat32, DataType::kFloat32, 1, 1, 0}, odd, stream_).ok());
  EXPECT_FALSE(gpu_->convert(gpu_->device_count(), {}, pieces, stream_).ok());
  check(gpu_->convert(kDevice, {}, pieces, stream_));  // nothing of that sticks
  wait_for_stream();
}

// ---- Streams, events, memory ----

TEST_F(OnGpu, LetsOneStreamWaitForAnother) {
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  unsigned char* memory = device_memory(kBytes);
  unsigned char* seen = pinned_memory(1);
  DeviceStream other = *gpu_->create_stream(kDevice);
  for (int round = 1; round <= 20; ++round) {
    DeviceConversion fill;
    fill.fill = static_cast<std::uint64_t>(round);
    check(gpu_->convert(kDevice, fill, std::array{DevicePiece{nullptr, memory, kBytes}}, stream_));
    check(gpu_->record(kDevice, event_, stream_));
    check(gpu_->wait(kDevice, other, event_));
    check(gpu_->copy(kDevice, seen, memory + kBytes - 1, 1, other));
    check(gpu_->record(kDevice, event_, other));
    ASSERT_TRUE(wait_for(event_));
    ASSERT_EQ(*seen, round);
  }
  EXPECT_FALSE(*gpu_->is_capturing(kDevice, other));
  EXPECT_FALSE(*gpu_->is_capturing(kDevice, nullptr));
  gpu_->destroy_stream(kDevice, other);
}

TEST_F(OnGpu, LeavesAThreadWithoutADeviceAsItWas) {
  std::jthread([&] {
    EXPECT_EQ(*gpu_->exchange_current(-1), -1);
    EXPECT_TRUE(*gpu_->query(kDevice, event_)) << "never recorded";
    const int last = gpu_->device_count() - 1;
    EXPECT_EQ(*gpu_->exchange_current(last), -1);
    EXPECT_TRUE(*gpu_->query(kDevice, event_));
    EXPECT_EQ(*gpu_->exchange_current(-1), last);
    EXPECT_EQ(*gpu_->exchange_current(-1), -1);
  }).join();
}

TEST_F(OnGpu, KnowsWhoseMemoryLiesWhere) {
  const int last = gpu_->device_count() - 1;
  Result<void*> memory = gpu_->allocate(last, 512);
  ASSERT_TRUE(memory.ok()) << memory.status().text();
  EXPECT_EQ(*gpu_->device_of(static_cast<std::byte*>(*memory) + 256), last);
  gpu_->free(last, *memory);
  const int on_host = 0;
  EXPECT_EQ(gpu_->device_of(&on_host).status().code(), StatusCode::kInvalidArgument);
  Result<void*> pinned = gpu_->allocate_pinned(512);
  ASSERT_TRUE(pinned.ok()) << pinned.status().text();
  EXPECT_EQ(gpu_->device_of(*pinned).status().code(), StatusCode::kInvalidArgument);
  gpu_->free_pinned(*pinned);
}

TEST_F(OnGpu, SaysHowManyBytesThereWereNoMemoryFor) {
  const Result<void*> memory = gpu_->allocate(kDevice, std::size_t{1} << 50);
  ASSERT_FALSE(memory.ok());
  EXPECT_EQ(memory.status().code(), StatusCode::kInternal);
  EXPECT_NE(memory.status().text().find("1125899906842624 bytes"), std::string::npos) << memory.status().text();
  EXPECT_NE(memory.status().text().find("cudaErrorMemoryAllocation"), std::string::npos) << memory.status().text();
  wait_for_stream();  // the error does not stick
}

// ---- Speed ----

class OnGpuSpeed : public OnGpu {
 protected:
  /// Bytes read and written in a second, in GB, at the median of some runs.
  double rate_of(std::size_t bytes, const std::function<void()>& work) {
    std::vector<double> rates;
    for (int run = 0; run < 7; ++run) {
      wait_for_stream();
      const auto begin = steady_clock::now();
      for (int i = 0; i < 10; ++i) work();
      wait_for_stream();
      const std::chrono::duration<double> seconds = steady_clock::now() - begin;
      rates.push_back(20.0 * static_cast<double>(bytes) / seconds.count() * 1e-9);
    }
    std::ranges::sort(rates);
    return rates[rates.size() / 2];
  }

  void compare(const char* name, const DeviceConversion& conversion, const std::vector<DevicePiece>& pieces) {
    std::size_t bytes = 0;
    for (const DevicePiece& piece : pieces) bytes += piece.count * size_of(conversion.from_type);
    const double copied = rate_of(bytes, [&] { check(gpu_->copy(kDevice, to_, from_, bytes, stream_)); });
    const double rate = rate_of(bytes, [&] { check(gpu_->convert(kDevice, conversion, pieces, stream_)); });
    std::printf("%-34s %4zu pieces, %7.1f MB: %6.0f GB/s, %3.0f %% of a copy's %6.0f\n", name, pieces.size(),
                static_cast<double>(bytes) * 1e-6, rate, 100 * rate / copied, copied);
  }

  std::vector<DevicePiece> equal_pieces(std::size_t number, std::size_t bytes, DataType type, std::size_t shift = 0) {
    std::vector<DevicePiece> pieces;
    for (std::size_t i = 0; i < number; ++i) {
      pieces.push_back({from_ + i * bytes, to_ + i * bytes + shift, (bytes - 64) / size_of(type)});
    }
    return pieces;
  }

  void SetUp() override {
    OnGpu::SetUp();
    if (gpu_ == nullptr) return;
    from_ = device_memory(kBytes);
    to_ = device_memory(kBytes);
    check(gpu_->convert(kDevice, {}, std::array{DevicePiece{nullptr, from_, kBytes}}, stream_));
  }

  static constexpr std::size_t kBytes = std::size_t{1} << 30;
  unsigned char* from_ = nullptr;
  unsigned char* to_ = nullptr;
};

TEST_F(OnGpuSpeed, OfPackingAndUnpacking) {
  std::printf("%s\n", gpu_->description().c_str());
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  const auto all = [](DataType type, double factor, int divisor) {
    return DeviceConversion{type, type, factor, divisor, 0};
  };
  using enum DataType;
  compare("copy float32", all(kFloat32, 1, 1), equal_pieces(1, kBytes, kFloat32));
  compare("copy float32", all(kFloat32, 1, 1), equal_pieces(128, 8 * kMiB, kFloat32));
  compare("copy float32", all(kFloat32, 1, 1), equal_pieces(128, kMiB, kFloat32));
  compare("copy float32", all(kFloat32, 1, 1), equal_pieces(1024, 64 << 10, kFloat32));
  compare("copy float32, 4 bytes apart", all(kFloat32, 1, 1), equal_pieces(128, 8 * kMiB, kFloat32, 4));
  compare("copy float16, 2 bytes apart", all(kFloat16, 1, 1), equal_pieces(128, 8 * kMiB, kFloat16, 2));
  compare("copy uint8, 1 byte apart", all(kUint8, 1, 1), equal_pieces(128, 8 * kMiB, kUint8, 1));
  compare("float32 times 1/3", all(kFloat32, 1.0 / 3, 1), equal_pieces(128, 8 * kMiB, kFloat32));
  compare("float32 by 3", all(kFloat32, 1, 3), equal_pieces(128, 8 * kMiB, kFloat32));
  compare("float16 times 1/3", all(kFloat16, 1.0 / 3, 1), equal_pieces(128, 8 * kMiB, kFloat16));
  compare("float16 by 8", all(kFloat16, 1, 8), equal_pieces(128, 8 * kMiB, kFloat16));
  compare("float16 by 3", all(kFloat16, 1, 3), equal_pieces(128, 8 * kMiB, kFloat16));
  compare("float16 times 1/3 by 3", all(kFloat16, 1.0 / 3, 3), equal_pieces(128, 8 * kMiB, kFloat16));
  compare("bfloat16 by 8", all(kBfloat16, 1, 8), equal_pieces(128, 8 * kMiB, kBfloat16));
  compare("bfloat16 by 3", all(kBfloat16, 1, 3), equal_pieces(128, 8 * kMiB, kBfloat16));
  compare("float64 by 3", all(kFloat64, 1, 3), equal_pieces(128, 8 * kMiB, kFloat64));
  compare("int32 by 3", all(kInt32, 1, 3), equal_pieces(128, 8 * kMiB, kInt32));
  compare("int64 by 3", all(kInt64, 1, 3), equal_pieces(128, 8 * kMiB, kInt64));
  compare("int8 times 1/3", all(kInt8, 1.0 / 3, 1), equal_pieces(128, 8 * kMiB, kInt8));
}

}  // namespace
}  // namespace hvd
