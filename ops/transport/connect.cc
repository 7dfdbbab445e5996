#include "ops/transport/connect.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/rank_text.h"
#include "common/wire.h"
#include "ops/transport/members.h"
#include "ops/transport/shm/shm_connector.h"
#include "ops/transport/tcp/tcp_connector.h"

namespace hvd {
namespace {

constexpr std::string_view kWireVersion = "4";

using Blobs = std::vector<std::vector<std::byte>>;

// ---- what launched this process -------------------------------------------------------------------------------------

Result<int> number_from(const char* name, int low, int high) {
  const std::optional<std::string> text = environment(name);
  if (!text) return Status::invalid_argument(fmt::format("{} is not set, although the launcher's others are", name));
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < low || value > high) {
    return Status::invalid_argument(
        fmt::format("{}='{}' cannot be used: it has to be a whole number from {} to {}", name, *text, low, high));
  }
  return value;
}

struct RankAndSize {
  int rank;
  int size;
};

Result<RankAndSize> rank_and_size(const char* rank_name, const char* size_name) {
  constexpr int most = 1 << 20;
  Result<int> size = number_from(size_name, 1, most);
  if (!size) return size.status();
  Result<int> rank = number_from(rank_name, 0, *size - 1);
  if (!rank) return rank.status();
  return RankAndSize{*rank, *size};
}

Result<Launch> from_hvdrun() {
  Result<RankAndSize> place = rank_and_size("HOROVOD_RANK", "HOROVOD_SIZE");
  if (!place) return place.status();
  Result<int> port = number_from("HOROVOD_RENDEZVOUS_PORT", 1, 0xffff);
  if (!port) return port.status();
  TcpBootstrap::FromLauncher from;
  from.rank = place->rank;
  from.size = place->size;
  from.address = environment("HOROVOD_RENDEZVOUS_ADDR").value_or("127.0.0.1");
  from.port = static_cast<std::uint16_t>(*port);
  from.token = environment("HOROVOD_JOB_TOKEN").value_or("");
  if (from.token.empty()) {
    return Status::invalid_argument(
        "HOROVOD_JOB_TOKEN is not set, although the launcher's others are: whoever starts the ranks, as hvdrun does, "
        "gives all of them the same secret, without which strangers could join");
  }
  if (place->rank == 0 && place->size > 1) {
    Result<int> fd = number_from("HOROVOD_RENDEZVOUS_FD", 0, std::numeric_limits<int>::max());
    if (!fd) return fd.status();
    from.listen_fd = *fd;
  }
  return Launch(std::move(from));
}

Result<Launch> from_torchrun() {
  Result<RankAndSize> place = rank_and_size("RANK", "WORLD_SIZE");
  if (!place) return place.status();
  Result<int> port = number_from("MASTER_PORT", 1, 0xffff - 1);
  if (!port) return port.status();
  TcpBootstrap::FromTorchrun from;
  from.rank = place->rank;
  from.size = place->size;
  from.master_address = environment("MASTER_ADDR").value_or("127.0.0.1");
  from.master_port = static_cast<std::uint16_t>(*port);
  from.token = fmt::format("{}/{}/{}", environment("TORCHELASTIC_RUN_ID").value_or(""),
                           environment("TORCHELASTIC_RESTART_COUNT").value_or("0"), *port);
  return Launch(std::move(from));
}

Result<std::unique_ptr<Joined>> join_alone(const std::vector<int>& members) {
  const Result<std::vector<int>> checked = checked_members(members, 0, 1);
  if (!checked) return checked.status();
  return std::make_unique<Joined>(std::make_unique<SingleBootstrap>());
}

TcpBootstrap::FromTorchrun as_torchrun(const TcpBootstrap::FromLauncher& from) {
  return {from.rank, from.size, from.address, from.port, from.token};
}

// A part of the ranks that a launcher without MPI has started. Rank 0 of the launch, whom all know the way to, need not
// be in it, so the first member listens at a free port near the known one, on the host that has that.
Result<std::unique_ptr<Joined>> join_part(TcpBootstrap::FromTorchrun from, const std::vector<int>& members) {
  from.rank = static_cast<int>(std::find(members.begin(), members.end(), from.rank) - members.begin());
  from.size = static_cast<int>(members.size());
  from.token += fmt::format("/ranks {}", fmt::join(members, ","));
  Result<std::unique_ptr<TcpBootstrap>> tcp = TcpBootstrap::create(from);
  if (!tcp) return tcp.status();
  return std::make_unique<Joined>(std::move(tcp).value());
}

// ---- comparing ------------------------------------------------------------------------------------------------------

std::vector<std::byte> encode_settings(const std::vector<Setting>& settings) {
  WireWriter out;
  out.varint(settings.size());
  for (const Setting& setting : settings) {
    out.text(setting.name);
    out.text(setting.value);
  }
  return out.take();
}

Result<std::vector<std::vector<Setting>>> decode_settings(const Blobs& blobs) {
  std::vector<std::vector<Setting>> by_rank;
  for (std::size_t rank = 0; rank < blobs.size(); ++rank) {
    WireReader in(blobs[rank]);
    std::vector<Setting> settings(in.count(2));
    for (Setting& setting : settings) {
      setting.name = in.text();
      setting.value = in.text();
    }
    if (!in.ok()) return Status::internal(fmt::format("rank {} sent settings that cannot be read", rank));
    by_rank.push_back(std::move(settings));
  }
  return by_rank;
}

// ---- connecting -----------------------------------------------------------------------------------------------------

std::vector<std::byte> encode_ranks(const std::vector<int>& ranks) {
  WireWriter out;
  out.integers({ranks.begin(), ranks.end()});
  return out.take();
}

std::vector<std::vector<int>> decode_ranks(const Blobs& blobs) {
  std::vector<std::vector<int>> by_rank;
  for (const std::vector<std::byte>& blob : blobs) {
    WireReader in(blob);
    std::vector<int> ranks;
    for (const std::int64_t rank : in.integers()) {
      if (rank >= 0 && rank < static_cast<std::int64_t>(blobs.size())) ranks.push_back(static_cast<int>(rank));
    }
    by_rank.push_back(std::move(ranks));
  }
  return by_rank;
}

bool lists(const std::vector<int>& ranks, int rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

// Both say that they share memory.
bool share(const std::vector<std::vector<int>>& reached, int a, int b) {
  return lists(reached[static_cast<std::size_t>(a)], b) && lists(reached[static_cast<std::size_t>(b)], a);
}

class Connecting {
 public:
  Connecting(Joined& joined, const Options& options, TimePoint deadline)
      : joined_(joined),
        options_(options),
        deadline_(deadline),
        rank_(joined.bootstrap().rank()),
        size_(joined.bootstrap().size()) {
    connection_.rank = rank_;
    connection_.size = size_;
    connection_.fabric = std::make_unique<Fabric>(rank_, size_);
    settings_.generation = kFirstGeneration;
  }

  Result<Connection> run(const Handshake& handshake) {
    HVD_RETURN_IF_ERROR(compare(handshake));
    HVD_RETURN_IF_ERROR(share_memory());
    connection_.hosts = hosts_of(reached_);
    HVD_RETURN_IF_ERROR(connect_over_tcp());
    HVD_RETURN_IF_ERROR(route_data());
    if (blocks_are_shared()) connection_.fabric->share_blocks(slot_bytes_for(size_));
    place_on_hosts(connection_);
    return std::move(connection_);
  }

 private:
  Result<Blobs> allgather(std::span<const std::byte> mine) { return joined_.bootstrap().allgather(mine, deadline_); }

  Status compare(const Handshake& handshake) {
    std::vector<Setting> settings{{"library version", HVD_VERSION_TEXT}, {"wire version", std::string(kWireVersion)}};
    for (Setting& setting : agreed_settings(options_)) settings.push_back(std::move(setting));
    for (const Setting& setting : handshake.extra) settings.push_back(setting);
    Result<Blobs> blobs = allgather(encode_settings(settings));
    if (!blobs) return blobs.status();
    Result<std::vector<std::vector<Setting>>> by_rank = decode_settings(*blobs);
    if (!by_rank) return by_rank.status();
    const std::string differences = settings_differences(*by_rank);
    if (differences.empty()) return {};
    return Status::invalid_argument(fmt::format("the ranks of this job do not agree: {}", differences));
  }

  // Rank 0 makes the token that guards every connection of this job.
  Status share_memory() {
    WireWriter out;
    for (const std::byte byte : random_nonce()) out.fixed(static_cast<std::uint8_t>(byte));
    Result<Blobs> tokens = allgather(out.take());
    if (!tokens) return tokens.status();
    const std::vector<std::byte>& token = tokens->front();
    token_.assign(reinterpret_cast<const char*>(token.data()), token.size());

    Result<std::unique_ptr<ShmConnector>> connector = ShmConnector::create(rank_, size_, token_);
    if (!connector) log::warning("memory is not shared with other ranks: {}", connector.status().text());
    Result<Blobs> addresses = allgather(connector ? (*connector)->address() : std::vector<std::byte>());
    if (!addresses) return addresses.status();
    ShmConnector::Shared shared;
    if (connector) shared = (*connector)->connect(*addresses, settings_, deadline_);
    Result<Blobs> reached = allgather(encode_ranks(shared.peers));
    if (!reached) return reached.status();
    reached_ = decode_ranks(*reached);
    if (options_.transport == "tcp") return {};  // it was opened to see which ranks are on this host
    if (shared.transport) shared_ = &connection_.fabric->add(std::move(shared.transport));
    return {};
  }

  bool shares(int a, int b) const { return options_.transport != "tcp" && share(reached_, a, b); }

  Status connect_over_tcp() {
    std::vector<int> peers;
    bool anywhere = false;  // the same answer on all ranks
    for (int a = 0; a < size_; ++a) {
      for (int b = 0; b < size_; ++b) {
        if (a == b || shares(a, b)) continue;
        anywhere = true;
        if (a == rank_) peers.push_back(b);
      }
    }
    for (int peer = 0; peer < size_; ++peer) {
      if (peer != rank_ && shares(rank_, peer)) connection_.fabric->route_control(peer, *shared_);
    }
    if (!anywhere) return {};
    if (options_.transport == "shm") {
      return Status::unavailable("HOROVOD_TRANSPORT=shm needs all ranks on one host, and some do not share memory");
    }
    TcpConnector::Settings settings;
    settings.job_token = token_;
    settings.loopback_only = *std::max_element(connection_.hosts.begin(), connection_.hosts.end()) == 0;
    Result<std::unique_ptr<TcpConnector>> connector = TcpConnector::create(rank_, size_, std::move(settings));
    if (!connector) return connector.status();
    Result<Blobs> addresses = allgather((*connector)->address());
    if (!addresses) return addresses.status();
    Result<std::unique_ptr<StreamTransport>> transport = (*connector)->connect(*addresses, peers, settings_, deadline_);
    if (!transport) return transport.status();
    tcp_ = &connection_.fabric->add(std::move(transport).value());
    for (const int peer : peers) connection_.fabric->route_control(peer, *tcp_);
    return {};
  }

  // All that sends data by shared memory to some of its host sends it so to all of it; the same answer on all ranks.
  bool blocks_are_shared() const {
    if (options_.transport == "tcp" || options_.transport == "mpi") return false;
    for (int a = 0; a < size_; ++a) {
      for (int b = 0; b < a; ++b) {
        const bool same_host =
            connection_.hosts[static_cast<std::size_t>(a)] == connection_.hosts[static_cast<std::size_t>(b)];
        if (same_host && !share(reached_, a, b)) return false;
      }
    }
    return true;
  }

  Status route_data() {
    const bool forced = options_.transport == "mpi";
    const bool possible = joined_.mpi() != nullptr && joined_.mpi()->has_all_ranks();
    if (forced && !possible) {
      return Status::unavailable(joined_.mpi() == nullptr
                                     ? "HOROVOD_TRANSPORT=mpi needs a job that was started through MPI (mpirun)"
                                     : "HOROVOD_TRANSPORT=mpi needs a job of all ranks that mpirun has started");
    }
    const bool several_hosts = tcp_ != nullptr && options_.transport == "auto";
    Transport* mpi = nullptr;
    if (possible && size_ > 1 && (forced || several_hosts)) {
      mpi = &connection_.fabric->add(joined_.mpi()->make_transport(rank_, size_, kFirstGeneration));
    }
    for (int peer = 0; peer < size_; ++peer) {
      if (peer == rank_) continue;
      const bool near = shares(rank_, peer);
      Transport* way = forced || (mpi != nullptr && !near) ? mpi : near ? shared_ : tcp_;
      HVD_CHECK(way != nullptr);  // whoever shares no memory is reached over TCP
      connection_.fabric->route_data(peer, *way);
    }
    return {};
  }

  Joined& joined_;
  const Options& options_;
  TimePoint deadline_;
  int rank_;
  int size_;
  StreamTransport::Settings settings_;
  std::string token_;
  std::vector<std::vector<int>> reached_;
  Transport* shared_ = nullptr;
  Transport* tcp_ = nullptr;
  Connection connection_;
};

}  // namespace

Result<Launch> detect_launch() {
  if (environment("HOROVOD_RANK") && environment("HOROVOD_SIZE") && environment("HOROVOD_RENDEZVOUS_PORT")) {
    return from_hvdrun();
  }
  if (MpiRuntime::launched_size() || MpiRuntime::already_initialised()) return Launch(MpiLaunch{});
  if (environment("RANK") && environment("WORLD_SIZE") && environment("MASTER_ADDR")) return from_torchrun();
  return Launch(SingleLaunch{});
}

Result<std::unique_ptr<Joined>> join_job(const std::vector<int>& members, TimePoint deadline) {
  Result<Launch> launch = detect_launch();
  if (!launch) return launch.status();
  if (std::holds_alternative<MpiLaunch>(*launch)) {
    Result<std::unique_ptr<MpiRuntime>> mpi = MpiRuntime::open(members, deadline);
    if (mpi) return std::make_unique<Joined>(std::move(mpi).value());
    // A job of one rank needs no MPI to find the others.
    const bool alone = mpi.status().code() == StatusCode::kUnavailable && MpiRuntime::launched_size() == 1;
    if (!alone) return mpi.status();
    return join_alone(members);
  }
  if (std::holds_alternative<SingleLaunch>(*launch)) {
    return join_alone(members);
  }
  const auto* hvdrun = std::get_if<TcpBootstrap::FromLauncher>(&*launch);
  const TcpBootstrap::FromTorchrun from =
      hvdrun != nullptr ? as_torchrun(*hvdrun) : std::get<TcpBootstrap::FromTorchrun>(*launch);
  Result<std::vector<int>> part = checked_members(members, from.rank, from.size);
  if (!part) return part.status();
  if (!part->empty()) return join_part(from, *part);
  Result<std::unique_ptr<TcpBootstrap>> tcp =
      hvdrun != nullptr ? TcpBootstrap::create(*hvdrun) : TcpBootstrap::create(from);
  if (!tcp) return tcp.status();
  return std::make_unique<Joined>(std::move(tcp).value());
}

Result<Connection> connect_all(Joined& joined, const Options& options, const Handshake& handshake, TimePoint deadline) {
  return Connecting(joined, options, deadline).run(handshake);
}

std::string settings_differences(const std::vector<std::vector<Setting>>& by_rank) {
  std::vector<std::string> names;  // in the order in which they are first seen
  std::map<std::string, std::map<std::string, std::vector<int>>> ranks_by_value;
  for (std::size_t rank = 0; rank < by_rank.size(); ++rank) {
    for (const Setting& setting : by_rank[rank]) {
      if (!ranks_by_value.contains(setting.name)) names.push_back(setting.name);
      ranks_by_value[setting.name][setting.value].push_back(static_cast<int>(rank));
    }
  }
  std::string text;
  for (const std::string& name : names) {
    const auto& values = ranks_by_value[name];
    const bool alike = values.size() == 1 && values.begin()->second.size() == by_rank.size();
    if (alike) continue;
    text += fmt::format("{}{}:", text.empty() ? "" : "; ", name);
    bool first = true;
    for (const auto& [value, ranks] : values) {
      text += fmt::format("{} {}: {}", std::exchange(first, false) ? "" : ",", value.empty() ? "(none)" : value,
                          rank_text(ranks));
    }
  }
  return text;
}

std::vector<int> hosts_of(const std::vector<std::vector<int>>& reached) {
  const int size = static_cast<int>(reached.size());
  std::vector<int> hosts(reached.size(), -1);
  int next = 0;
  for (int rank = 0; rank < size; ++rank) {
    int& host = hosts[static_cast<std::size_t>(rank)];
    for (int other = 0; other < rank && host < 0; ++other) {
      if (share(reached, rank, other)) host = hosts[static_cast<std::size_t>(other)];
    }
    if (host < 0) host = next++;
  }
  return hosts;
}

void place_on_hosts(Connection& connection) {
  std::map<int, int> sizes;                         // ranks of each host
  std::vector<int> local(connection.hosts.size());  // local rank of each rank
  for (std::size_t rank = 0; rank < local.size(); ++rank) local[rank] = sizes[connection.hosts[rank]]++;
  const auto self = static_cast<std::size_t>(connection.rank);
  connection.local_rank = local[self];
  connection.local_size = sizes[connection.hosts[self]];
  connection.cross_rank = 0;
  connection.cross_size = 0;
  for (const auto& [host, size] : sizes) {
    if (size <= connection.local_rank) continue;
    ++connection.cross_size;
    if (host < connection.hosts[self]) ++connection.cross_rank;
  }
  connection.homogeneous =
      std::all_of(sizes.begin(), sizes.end(), [&](const auto& host) { return host.second == sizes.begin()->second; });
}

}  // namespace hvd
