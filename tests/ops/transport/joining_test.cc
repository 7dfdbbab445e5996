// How ranks meet: with the right ones, in spite of strangers, and with a clear word about who has not come.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <thread>

#include "ops/transport/connect.h"
#include "ops/transport/shm/shm_connector.h"
#include "ops/transport/shm/shm_greeting.h"
#include "ops/transport/shm/shm_socket.h"
#include "ops/transport/tcp/message_socket.h"
#include "ops/transport/tcp/tcp_bootstrap.h"
#include "ops/transport/tcp/tcp_connector.h"
#include "tests/ops/transport/transport_ends.h"

namespace hvd::testing {
namespace {

using namespace std::chrono_literals;

TimePoint in(Duration time) { return SteadyClock().now() + time; }

// Runs `body` in a thread for each rank.
void each_rank(int size, const std::function<void(int)>& body) {
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back(body, rank);
}

// ---- shared memory
// ---------------------------------------------------------------------------------------------------

std::vector<std::vector<int>> share(const std::vector<std::string>& tokens,
                                    std::vector<Bytes> (*change)(std::vector<Bytes>), Duration patience) {
  const int size = static_cast<int>(tokens.size());
  std::vector<std::unique_ptr<ShmConnector>> connectors;
  std::vector<Bytes> addresses;
  for (int rank = 0; rank < size; ++rank) {
    auto made = ShmConnector::create(rank, size, tokens[static_cast<std::size_t>(rank)], 4096);
    EXPECT_TRUE(made.ok()) << made.status().text();
    connectors.push_back(std::move(made).value());
    addresses.push_back(connectors.back()->address());
  }
  addresses = change(std::move(addresses));
  std::vector<std::vector<int>> reached(tokens.size());
  each_rank(size, [&](int rank) {
    const auto i = static_cast<std::size_t>(rank);
    reached[i] = connectors[i]->connect(addresses, {}, in(patience)).peers;
  });
  return reached;
}

std::vector<Bytes> as_they_are(std::vector<Bytes> addresses) { return addresses; }

TEST(RingBytes, ShrinkWithTheNumberOfRanks) {
  constexpr std::size_t kib = 1024;
  EXPECT_EQ(ring_bytes_for(1), 1024 * kib);
  EXPECT_EQ(ring_bytes_for(2), 1024 * kib);
  EXPECT_EQ(ring_bytes_for(17), 1024 * kib);
  EXPECT_EQ(ring_bytes_for(18), 512 * kib);
  EXPECT_EQ(ring_bytes_for(65), 256 * kib);
  EXPECT_EQ(ring_bytes_for(129), 128 * kib);
  EXPECT_EQ(ring_bytes_for(100'000), 128 * kib);
}

TEST(ShmConnector, RanksOfOneJobReachEachOther) {
  EXPECT_EQ(share({"t", "t", "t"}, as_they_are, 60s), (std::vector<std::vector<int>>{{1, 2}, {0, 2}, {0, 1}}));
}

TEST(ShmConnector, ARankWithAnotherTokenIsLeftOutOnBothSidesAtOnce) {
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(share({"t", "another", "t"}, as_they_are, 60s), (std::vector<std::vector<int>>{{2}, {}, {0}}));
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("another job token"), std::string::npos) << log;
}

TEST(ShmConnector, ARankThatTakesNoPartOrPublishesNonsenseIsNotOnThisHost) {
  const auto reached = share(
      {"t", "t", "t"},
      [](std::vector<Bytes> addresses) {
        addresses[1].clear();
        addresses[2] = pattern(30, 1);
        return addresses;
      },
      60s);
  EXPECT_TRUE(reached[0].empty());
}

TEST(ShmConnector, ARankThatNeverAnswersIsLeftOutAtTheDeadline) {
  ::testing::internal::CaptureStderr();
  auto mine = ShmConnector::create(1, 2, "t", 4096);
  auto silent = ShmConnector::create(0, 2, "t", 4096);  // listens, and does no more
  ASSERT_TRUE(mine.ok() && silent.ok());
  const std::vector<Bytes> addresses{silent.value()->address(), mine.value()->address()};
  EXPECT_TRUE(mine.value()->connect(addresses, {}, in(50ms)).peers.empty());
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("did not answer in time"), std::string::npos);
}

std::string socket_name_in(const Bytes& address) {
  WireReader reader(address);
  reader.text();
  return reader.text();
}

TEST(ShmConnector, StrangersAtTheSocketDelayNobodyAndAreNotLetIn) {
  ::testing::internal::CaptureStderr();
  auto first = ShmConnector::create(0, 2, "t", 4096);
  auto second = ShmConnector::create(1, 2, "t", 4096);
  ASSERT_TRUE(first.ok() && second.ok());
  const std::vector<Bytes> addresses{first.value()->address(), second.value()->address()};
  std::vector<UniqueFd> strangers(3);  // the last says nothing at all
  for (UniqueFd& stranger : strangers) {
    ASSERT_EQ(dial(socket_name_in(addresses[0]), stranger), ShmDial::kConnected);
  }
  EXPECT_EQ(send_packet(strangers[0].get(), pattern(100, 1), {}), ShmSent::kYes);
  strangers[1].reset();
  // Without end, so that a wait for a stranger is seen by the limit of the whole test.
  each_rank(2, [&](int rank) {
    auto& connector = rank == 0 ? first.value() : second.value();
    EXPECT_EQ(connector->connect(addresses, {}, in(1h)).peers, std::vector<int>{1 - rank});
  });
  ::testing::internal::GetCapturedStderr();
}

TEST(ShmConnector, WhoDoesNotKnowTheTokenIsNotTakenForTheRankThatItClaimsToBe) {
  ::testing::internal::CaptureStderr();
  auto first = ShmConnector::create(0, 2, "t", 4096);
  ASSERT_TRUE(first.ok());
  const std::vector<Bytes> addresses{first.value()->address(), first.value()->address()};
  UniqueFd stranger;
  ASSERT_EQ(dial(socket_name_in(addresses[0]), stranger), ShmDial::kConnected);
  ShmGreeting forged;
  forged.from = 1;
  forged.to = 0;
  forged.size = 2;
  forged.ring_bytes = 4096;
  forged.token = "guess";
  EXPECT_EQ(send_packet(stranger.get(), encode_greeting(forged), {}), ShmSent::kYes);
  EXPECT_TRUE(first.value()->connect(addresses, {}, in(1h)).peers.empty());
  ::testing::internal::GetCapturedStderr();
}

TEST(ShmGreeting, IsReadAsItWasWrittenAndNothingElseIs) {
  ShmGreeting greeting;
  greeting.word = ShmWord::kAccept;
  greeting.from = 7;
  greeting.to = 3;
  greeting.size = 9;
  greeting.ring_bytes = std::uint64_t{1} << 20;
  greeting.nonce[3] = std::byte{5};
  greeting.has_process = true;
  greeting.token = "a token";
  const Bytes bytes = encode_greeting(greeting);
  const auto back = decode_greeting(bytes);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->word, greeting.word);
  EXPECT_EQ(back->from, greeting.from);
  EXPECT_EQ(back->to, greeting.to);
  EXPECT_EQ(back->size, greeting.size);
  EXPECT_EQ(back->ring_bytes, greeting.ring_bytes);
  EXPECT_EQ(back->nonce, greeting.nonce);
  EXPECT_EQ(back->has_process, greeting.has_process);
  EXPECT_EQ(back->token, greeting.token);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode_greeting(Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size))).has_value());
  }
  std::mt19937_64 random = generator_of_this_run();
  for (int round = 0; round < 5000; ++round) {
    Bytes changed = bytes;
    changed[random() % changed.size()] = static_cast<std::byte>(random());
    if (random() % 2 == 0) changed.resize(random() % 200);
    decode_greeting(changed);
  }
  EXPECT_TRUE(equal_in_constant_time("abc", "abc"));
  EXPECT_FALSE(equal_in_constant_time("abc", "abd"));
  EXPECT_FALSE(equal_in_constant_time("abc", "ab"));
  EXPECT_FALSE(equal_in_constant_time("", "a"));
}

// ---- TCP
// -------------------------------------------------------------------------------------------------------------

struct TcpRanks {
  explicit TcpRanks(const std::vector<std::string>& tokens) {
    for (std::size_t rank = 0; rank < tokens.size(); ++rank) {
      auto made =
          TcpConnector::create(static_cast<int>(rank), static_cast<int>(tokens.size()), {tokens[rank], true, {}});
      EXPECT_TRUE(made.ok()) << made.status().text();
      connectors.push_back(std::move(made).value());
      addresses.push_back(connectors.back()->address());
    }
  }
  std::vector<std::unique_ptr<TcpConnector>> connectors;
  std::vector<Bytes> addresses;
};

UniqueFd call(const Bytes& address) {
  WireReader reader(address);
  reader.count(7);
  const auto place = SocketAddress::read_from(reader);
  EXPECT_TRUE(place.ok());
  UniqueFd socket(::socket(place.value().family(), SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(socket.get(), place.value().data(), place.value().bytes()), 0);
  return socket;
}

TEST(TcpConnector, StrangersAreDroppedAndTheJobMeets) {
  TcpRanks ranks({"t", "t"});
  std::vector<UniqueFd> strangers;
  for (int i = 0; i < 4; ++i) strangers.push_back(call(ranks.addresses[0]));
  const Bytes junk = pattern(5000, 1);
  EXPECT_EQ(::send(strangers[0].get(), junk.data(), junk.size(), MSG_NOSIGNAL), static_cast<ssize_t>(junk.size()));
  const std::string request = "GET / HTTP/1.1\r\n\r\n";
  EXPECT_EQ(::send(strangers[1].get(), request.data(), request.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(request.size()));
  strangers[2].reset();
  std::array<bool, 2> met{};
  each_rank(2, [&](int rank) {
    const auto i = static_cast<std::size_t>(rank);
    const auto transport = ranks.connectors[i]->connect(ranks.addresses, {1 - rank}, {}, in(60s));
    met[i] = transport.ok();
    EXPECT_TRUE(transport.ok()) << transport.status().text();
  });
  EXPECT_TRUE(met[0] && met[1]);
}

TEST(TcpConnector, WhoHasNotComeIsNamedAtTheDeadline) {
  TcpRanks ranks({"t", "t", "t"});
  // Nobody else is there.
  const auto missing_above = ranks.connectors[0]->connect(ranks.addresses, {1, 2}, {}, in(50ms));
  ASSERT_FALSE(missing_above.ok());
  EXPECT_EQ(missing_above.status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(missing_above.status().text().find("ranks 1-2"), std::string::npos) << missing_above.status().text();
  const auto missing_below = ranks.connectors[2]->connect(ranks.addresses, {1}, {}, in(50ms));
  ASSERT_FALSE(missing_below.ok());
  EXPECT_NE(missing_below.status().text().find("rank 1"), std::string::npos) << missing_below.status().text();
}

TEST(TcpConnector, ARankWithAnotherTokenIsAStranger) {
  TcpRanks ranks({"t", "another"});
  each_rank(2, [&](int rank) {
    const auto transport =
        ranks.connectors[static_cast<std::size_t>(rank)]->connect(ranks.addresses, {1 - rank}, {}, in(200ms));
    EXPECT_FALSE(transport.ok());
  });
}

TEST(TcpConnector, NonsenseInPlaceOfAnAddressIsAnError) {
  TcpRanks ranks({"t", "t"});
  std::vector<Bytes> addresses = ranks.addresses;
  for (const Bytes& junk : {Bytes(), pattern(3, 1), pattern(100, 2)}) {
    addresses[0] = junk;
    EXPECT_FALSE(ranks.connectors[1]->connect(addresses, {0}, {}, in(50ms)).ok());
  }
}

TEST(TcpBootstrap, EveryRankGetsTheBytesOfAllAgainAndAgain) {
  for (const int size : {1, 2, 5}) {
    auto loopback = SocketAddress::resolve("127.0.0.1", 0);
    ASSERT_TRUE(loopback.ok());
    auto listener = listen_on(loopback.value().front());
    ASSERT_TRUE(listener.ok()) << listener.status().text();
    const std::uint16_t port = local_address(listener.value().get()).value().port();
    each_rank(size, [&](int rank) {
      TcpBootstrap::FromLauncher from;
      from.rank = rank;
      from.size = size;
      from.address = "127.0.0.1";
      from.port = port;
      from.token = "t";
      from.listen_fd = listener.value().get();
      auto bootstrap = TcpBootstrap::create(from);
      ASSERT_TRUE(bootstrap.ok()) << bootstrap.status().text();
      for (std::size_t round = 0; round < 3; ++round) {
        const std::size_t bytes = round == 1 ? 0 : 100'000 * round + 1;
        const auto all = bootstrap.value()->allgather(
            pattern(bytes + static_cast<std::size_t>(rank), static_cast<std::size_t>(rank)), in(60s));
        ASSERT_TRUE(all.ok()) << all.status().text();
        ASSERT_EQ(all.value().size(), static_cast<std::size_t>(size));
        for (std::size_t peer = 0; peer < all.value().size(); ++peer) {
          EXPECT_TRUE(all.value()[peer] == pattern(bytes + peer, peer)) << "of rank " << peer;
        }
      }
    });
  }
}

TEST(TcpBootstrap, NamesTheRanksThatDoNotCome) {
  auto loopback = SocketAddress::resolve("127.0.0.1", 0);
  auto listener = listen_on(loopback.value().front());
  TcpBootstrap::FromLauncher from;
  from.size = 3;
  from.address = "127.0.0.1";
  from.port = local_address(listener.value().get()).value().port();
  from.token = "t";
  from.listen_fd = listener.value().get();
  auto bootstrap = TcpBootstrap::create(from);
  ASSERT_TRUE(bootstrap.ok());
  const auto all = bootstrap.value()->allgather({}, in(50ms));
  ASSERT_FALSE(all.ok());
  EXPECT_EQ(all.status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(all.status().text().find("ranks 1-2"), std::string::npos) << all.status().text();
}

TEST(TcpGreeting, IsReadAsItWasWrittenAndNothingElseIs) {
  TcpGreeting greeting;
  greeting.purpose = TcpGreeting::Purpose::kRendezvous;
  greeting.rank = 3;
  greeting.size = 8;
  greeting.generation = 2;
  greeting.token = "a token";
  const Bytes bytes = encode_tcp_greeting(greeting);
  const auto back = decode_tcp_greeting(bytes);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->rank, 3);
  EXPECT_EQ(back->size, 8);
  EXPECT_EQ(back->generation, 2u);
  EXPECT_EQ(back->token, "a token");
  TcpGreeting own = greeting;
  own.rank = 0;
  EXPECT_TRUE(belongs(*back, own));
  EXPECT_FALSE(belongs(*back, greeting)) << "nobody else is this rank";
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(
        decode_tcp_greeting(Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size))).has_value());
  }
  TcpGreeting other = greeting;
  other.token = "another";
  EXPECT_FALSE(belongs(other, own));
  other = greeting;
  other.size = 9;
  EXPECT_FALSE(belongs(other, own));
}

TEST(MessageSocket, CarriesMessagesWholeAndRefusesThoseThatAreTooLong) {
  std::array<int, 2> pair{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair.data()), 0);
  MessageSocket left{UniqueFd(pair[0])};
  MessageSocket right(UniqueFd(pair[1]), /*most_bytes=*/1'000'000);
  const auto carry = [&](const Bytes& message) -> std::optional<Bytes> {
    left.queue(message);
    for (int i = 0; i < 100'000; ++i) {
      if (!left.advance().ok() || !right.advance().ok()) return std::nullopt;
      if (auto taken = right.take()) return taken;
    }
    return std::nullopt;
  };
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, std::size_t{8}, std::size_t{999'999}, std::size_t{1'000'000}}) {
    const Bytes message = pattern(size, 1);
    const auto got = carry(message);
    ASSERT_TRUE(got.has_value()) << size;
    EXPECT_TRUE(*got == message) << size;
  }
  EXPECT_FALSE(carry(pattern(1'000'001, 1)).has_value());
}

TEST(SocketAddress, IsReadAsItWasWritten) {
  for (const char* text : {"127.0.0.1", "::1", "192.0.2.7"}) {
    const auto found = SocketAddress::resolve(text, 4567);
    if (!found.ok()) continue;  // a machine without IPv6
    WireWriter out;
    found.value().front().write_to(out);
    const Bytes bytes = out.take();
    WireReader reader(bytes);
    const auto back = SocketAddress::read_from(reader);
    ASSERT_TRUE(back.ok()) << back.status().text();
    EXPECT_EQ(back.value().text(), found.value().front().text());
    EXPECT_EQ(back.value().port(), 4567);
    EXPECT_EQ(back.value().is_loopback(), std::string_view(text) != "192.0.2.7");
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      WireReader part(std::span<const std::byte>(bytes).first(size));
      EXPECT_FALSE(SocketAddress::read_from(part).ok());
    }
  }
}

// ---- after meeting
// ---------------------------------------------------------------------------------------------------

TEST(Hosts, AreNumberedByWhoSharesMemoryWithWhom) {
  EXPECT_EQ(hosts_of({{1}, {0}, {3}, {2}}), (std::vector<int>{0, 0, 1, 1}));
  EXPECT_EQ(hosts_of({{}, {}, {}}), (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(hosts_of({{2}, {}, {0}}), (std::vector<int>{0, 1, 0}));
  EXPECT_EQ(hosts_of({{1}, {}}), (std::vector<int>{0, 1})) << "a pair counts when both sides say so";
}

TEST(Hosts, GiveLocalAndCrossRanks) {
  Connection connection;
  connection.hosts = {0, 1, 0, 1, 0};
  connection.size = 5;
  connection.rank = 4;
  place_on_hosts(connection);
  EXPECT_EQ(connection.local_rank, 2);
  EXPECT_EQ(connection.local_size, 3);
  EXPECT_EQ(connection.cross_rank, 0);
  EXPECT_EQ(connection.cross_size, 1) << "the other host has no third rank";
  EXPECT_FALSE(connection.homogeneous);
  connection.hosts = {0, 1, 0, 1};
  connection.size = 4;
  connection.rank = 3;
  place_on_hosts(connection);
  EXPECT_EQ(connection.local_rank, 1);
  EXPECT_EQ(connection.cross_rank, 1);
  EXPECT_EQ(connection.cross_size, 2);
  EXPECT_TRUE(connection.homogeneous);
}

TEST(Settings, ThatDifferAreNamedWithTheirValuesAndRanks) {
  EXPECT_EQ(settings_differences({{{"A", "1"}, {"B", "2"}}, {{"A", "1"}, {"B", "2"}}}), "");
  const std::string text =
      settings_differences({{{"A", "1"}, {"B", "2"}}, {{"A", "1"}, {"B", "3"}}, {{"A", "1"}, {"B", "2"}}});
  EXPECT_EQ(text.find("A"), std::string::npos) << text;
  for (const char* part : {"B", "2", "3", "ranks 0,2", "rank 1"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace hvd::testing
