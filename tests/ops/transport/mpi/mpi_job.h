// The ranks of a job over an MPI in memory, all driven by the thread of the test.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "ops/transport/mpi/mpi_endpoint.h"
#include "ops/transport/mpi/mpi_transport.h"
#include "tests/ops/transport/mpi/fake_mpi.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {

/// Small, so that a transfer of a few kilobytes is several messages.
constexpr std::size_t kPiece = 1000;
constexpr std::size_t kInline = 100;
constexpr int kSlots = 16;  // receives of announcements that a rank keeps with MPI

struct MpiJob {
  explicit MpiJob(int size, std::mt19937_64& drawn, int largest_tag = 32767) : mpi(size, drawn()), random(drawn) {
    for (int rank = 0; rank < size; ++rank) {
      ends.push_back(std::make_unique<End>(rank));
      endpoints.push_back(std::make_unique<MpiEndpoint>(mpi.api(rank), rank, size, largest_tag));
      endpoints.back()->resume();
    }
  }
  /// Every rank has its transport.
  static std::unique_ptr<MpiJob> opened(int size, std::mt19937_64& random, int largest_tag = 32767) {
    auto job = std::make_unique<MpiJob>(size, random, largest_tag);
    for (int rank = 0; rank < size; ++rank) job->open(rank);
    return job;
  }

  End& operator[](int rank) { return *ends[static_cast<std::size_t>(rank)]; }
  MpiEndpoint& endpoint(int rank) { return *endpoints[static_cast<std::size_t>(rank)]; }

  void open(int rank, MpiLife life = 1, std::size_t piece_bytes = kPiece) {
    (*this)[rank].use(std::make_unique<MpiTransport>(endpoint(rank), life, MpiLimits{piece_bytes, kInline}));
  }
  void close(int rank) { (*this)[rank].transport.reset(); }

  void step() {
    std::vector<MpiEndpoint*> order;
    for (const auto& one : endpoints) order.push_back(one.get());
    std::shuffle(order.begin(), order.end(), random);
    for (MpiEndpoint* one : order) one->progress();
  }
  void step(int count) {
    for (int i = 0; i < count; ++i) step();
  }
  /// False when that took too long: nothing here waits for anything but its turn.
  template <typename Condition>
  bool drive_until(Condition condition) {
    for (int i = 0; i < 100'000; ++i) {
      if (condition()) return true;
      step();
    }
    return false;
  }
  bool drive_until_done(const std::vector<TransferRef>& transfers) {
    return drive_until([&] {
      return std::all_of(transfers.begin(), transfers.end(), [](const TransferRef& one) { return one->done(); });
    });
  }
  /// Of all that was sent and asked for nothing is left with MPI.
  bool comes_to_rest() {
    return drive_until([&] {
      for (int rank = 0; rank < static_cast<int>(ends.size()); ++rank) {
        if (mpi.unfinished(rank) != kSlots || endpoint(rank).mover().held() != 0) return false;
      }
      return true;
    });
  }

  FakeMpi mpi;
  std::mt19937_64& random;
  std::vector<std::unique_ptr<MpiEndpoint>> endpoints;
  std::vector<std::unique_ptr<End>> ends;  // their transports go before the endpoints
};

inline ::testing::AssertionResult says(const Status& status, std::string_view words) {
  if (!status.ok() && status.text().find(words) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "'" << status.text() << "' does not say '" << words << "'";
}

}  // namespace hvd::testing
