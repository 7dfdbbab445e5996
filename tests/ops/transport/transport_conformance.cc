#include "tests/ops/transport/transport_conformance.h"

#include <poll.h>

#include <thread>
#include <utility>

#include "ops/transport/inproc/inproc_network.h"
#include "ops/transport/shm/shm_connector.h"
#include "ops/transport/tcp/tcp_connector.h"

namespace hvd::testing {
namespace {

// The ranks meet through what `make` gives, each in a thread of its own, as meeting blocks.
template <typename Connector, typename Connect>
void meet(Ends& ends, std::vector<std::unique_ptr<Connector>> connectors, Connect connect) {
  std::vector<Bytes> addresses;
  for (const auto& connector : connectors) addresses.push_back(connector->address());
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < ends.size(); ++rank) {
    threads.emplace_back(
        [&, rank] { ends[rank].use(connect(*connectors[static_cast<std::size_t>(rank)], addresses, rank)); });
  }
}

void connect_in_process(Ends& ends, const SettingsOf& settings) {
  InprocNetwork network(ends.size(), std::size_t{64} << 10, true);  // transports may outlive it
  for (int rank = 0; rank < ends.size(); ++rank) {
    ends[rank].use(network.connect(rank, ends[rank].poller, settings(rank)));
  }
}

void connect_shared_memory(Ends& ends, const SettingsOf& settings) {
  std::vector<std::unique_ptr<ShmConnector>> connectors;
  for (int rank = 0; rank < ends.size(); ++rank) {
    auto made = ShmConnector::create(rank, ends.size(), "a token", std::size_t{64} << 10);
    ASSERT_TRUE(made.ok()) << made.status().text();
    connectors.push_back(std::move(made).value());
  }
  meet(ends, std::move(connectors), [&](ShmConnector& connector, const std::vector<Bytes>& addresses, int rank) {
    ShmConnector::Shared shared = connector.connect(addresses, settings(rank), in_a_minute());
    EXPECT_EQ(static_cast<int>(shared.peers.size()), ends.size() - 1) << "not all ranks share memory";
    return std::move(shared.transport);
  });
}

void connect_tcp(Ends& ends, const SettingsOf& settings) {
  std::vector<std::unique_ptr<TcpConnector>> connectors;
  for (int rank = 0; rank < ends.size(); ++rank) {
    TcpConnector::Settings tcp;
    tcp.job_token = "a token";
    tcp.loopback_only = true;
    auto made = TcpConnector::create(rank, ends.size(), tcp);
    ASSERT_TRUE(made.ok()) << made.status().text();
    connectors.push_back(std::move(made).value());
  }
  meet(ends, std::move(connectors), [&](TcpConnector& connector, const std::vector<Bytes>& addresses, int rank) {
    std::vector<int> peers;
    for (int peer = 0; peer < ends.size(); ++peer) {
      if (peer != rank) peers.push_back(peer);
    }
    StreamTransport::Settings mine = settings(rank);
    const std::uint32_t generation = std::exchange(mine.generation, 0);
    // Ranks of different generations refuse each other when they meet: what is to be tried is what comes later.
    EXPECT_EQ(generation, 0u) << "use another transport for frames of other generations";
    auto transport = connector.connect(addresses, peers, mine, in_a_minute());
    EXPECT_TRUE(transport.ok()) << transport.status().text();
    return std::move(transport).value();
  });
}

constexpr bool kAlways = true;

}  // namespace

const std::vector<TransportKind>& transport_kinds() {
  static const std::vector<TransportKind> kinds{
      {"InProcess", connect_in_process, false, !kAlways, false, true},
      {"SharedMemory", connect_shared_memory, true, !kAlways, false, true},
      {"Tcp", connect_tcp, true, kAlways},
      {"InProcessPulled", connect_in_process, false, !kAlways, true, true},
      {"SharedMemoryPulled", connect_shared_memory, true, !kAlways, true, true},
  };
  return kinds;
}

void TransportConformance::connect(Ends& ends, const SettingsOf& settings) {
  GetParam().connect(ends, settings);
  for (int rank = 0; rank < ends.size(); ++rank) {
    ASSERT_NE(ends[rank].transport, nullptr);
    if (GetParam().pulls) ends[rank].pull_from = kEager + 1;
  }
}

bool TransportConformance::is_rung(End& end, int wakes_before) {
  if (!GetParam().has_descriptor) return end.poller.wakes() > wakes_before;
  pollfd place{end.transport->wake_fd(), POLLIN, 0};
  return ::poll(&place, 1, 60'000) == 1;
}

}  // namespace hvd::testing
