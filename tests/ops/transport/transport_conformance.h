// The transports that have to do alike: in-process, shared memory, TCP, the first two also where receivers read the
// memory of senders. The ranks of shared memory and TCP meet as they do in a job, but inside this process. The suite is
// in transport_conformance_test.cc, transport_losses_test.cc and transport_blocks_test.cc.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "common/clock.h"
#include "ops/transport/stream_transport.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {

inline const std::size_t kEager = StreamTransport::Settings().eager_limit_bytes;

inline TimePoint in_a_minute() { return SteadyClock().now() + std::chrono::seconds(60); }

using SettingsOf = std::function<StreamTransport::Settings(int rank)>;

struct TransportKind {
  std::string name;
  void (*connect)(Ends& ends, const SettingsOf& settings);
  bool has_descriptor;  ///< otherwise it wakes through the poller
  bool agrees_on_generation;
  bool pulls = false;  ///< what is larger than an eager message
  bool has_blocks = false;
};

const std::vector<TransportKind>& transport_kinds();

class TransportConformance : public ::testing::TestWithParam<TransportKind> {
 protected:
  void connect(Ends& ends, const SettingsOf& settings = [](int) { return StreamTransport::Settings(); });
  /// Whether something rang `end` since it armed; waits for it.
  bool is_rung(End& end, int wakes_before);

  std::mt19937_64 random_ = generator_of_this_run();
};

}  // namespace hvd::testing
