// Many ranks in one thread: each has a loop and in-process transports, and they are driven in turn, in an order drawn
// from a seed. Nothing waits, so a collective that cannot go on is seen at once instead of by a timeout.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "ops/collective_context.h"
#include "ops/transport/inproc/inproc_network.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {

/// Ranks that are driven never sleep.
class IdlePoller final : public Poller {
 public:
  Status watch(int /*fd*/) override { return {}; }
  void unwatch(int /*fd*/) override {}
  void wait(TimePoint /*deadline*/) override {}
  void wake() override {}
};

class SteppedRanks final : private TransportEvents {
 public:
  struct Settings {
    std::size_t eager_limit_bytes = std::size_t{32} << 10;
    std::size_t ring_bytes = std::size_t{16} << 10;
    std::size_t segment_bytes = 256;
    std::size_t pull_from_bytes = 0;  ///< messages of so many bytes are pulled; 0: none
  };
  /// Starts a collective; a plain function that calls a coroutine, never a coroutine itself.
  using Body = std::function<Task<Status>(CollectiveContext& context, int rank)>;

  SteppedRanks(int size, std::mt19937_64& random, Settings settings)
      : random_(random), settings_(settings), network_(size, settings.ring_bytes, true) {
    auto everyone = std::make_shared<Membership>();
    everyone->ranks.resize(static_cast<std::size_t>(size));
    std::iota(everyone->ranks.begin(), everyone->ranks.end(), 0);
    everyone->hosts.assign(static_cast<std::size_t>(size), 0);
    membership_ = std::move(everyone);
    for (int rank = 0; rank < size; ++rank) {
      StreamTransport::Settings transport_settings;
      transport_settings.eager_limit_bytes = settings.eager_limit_bytes;
      auto fabric = std::make_unique<Fabric>(rank, size);
      Transport& transport = fabric->add(network_.connect(rank, poller_, std::move(transport_settings)));
      for (int peer = 0; peer < size; ++peer) {
        fabric->route_control(peer, transport);
        fabric->route_data(peer, transport);
      }
      fabric->share_blocks(network_.slot_bytes());
      fabric->set_events(*this);
      ranks_.push_back({std::make_unique<Loop>(clock_), std::move(fabric)});
    }
  }

  int size() const { return static_cast<int>(ranks_.size()); }

  /// One collective on all ranks, which come to it in a random order; each rank's end.
  std::vector<Status> run(const Body& body) {
    Call call(*this);
    std::vector<int> order(ranks_.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (const int rank : order) {
      call.start(rank, body);
      if (random_() % 2 == 0) call.step();
    }
    while (!call.all_done()) {
      if (!call.step()) break;
    }
    return call.ends();
  }

  /// A collective under way.
  class Call {
   public:
    explicit Call(SteppedRanks& ranks)
        : ranks_(ranks), number_(ranks.next_call_++), contexts_(ranks.ranks_.size()), ends_(ranks.ranks_.size()) {}

    void start(int rank, const Body& body) {
      const auto i = static_cast<std::size_t>(rank);
      CollectiveContext::Settings settings;
      settings.call = number_;
      settings.segment_bytes = ranks_.settings_.segment_bytes;
      settings.pull_from_bytes = ranks_.settings_.pull_from_bytes;
      contexts_[i] = std::make_unique<CollectiveContext>(*ranks_.ranks_[i].loop, *ranks_.ranks_[i].fabric,
                                                         ranks_.membership_, settings);
      contexts_[i]->pull_if_large(settings.pull_from_bytes);
      ranks_.ranks_[i].loop->spawn(note_end(body(*contexts_[i], rank), ends_[i]));
    }
    /// Drives every rank once. False when nothing moved.
    bool step() { return ranks_.step(); }
    /// Drives until nothing moves.
    void settle() {
      while (step()) {
      }
    }
    bool done(int rank) const { return ends_[static_cast<std::size_t>(rank)].has_value(); }
    bool all_done() const {
      return std::all_of(ends_.begin(), ends_.end(), [](const auto& end) { return end.has_value(); });
    }
    CollectiveContext& context(int rank) { return *contexts_[static_cast<std::size_t>(rank)]; }
    std::vector<Status> ends() const {
      std::vector<Status> all;
      for (const auto& end : ends_) all.push_back(end.value_or(Status::internal("nothing moves any more")));
      return all;
    }

   private:
    static Task<void> note_end(Task<Status> task, std::optional<Status>& end) { end = co_await std::move(task); }

    SteppedRanks& ranks_;
    std::uint64_t number_;
    std::vector<std::unique_ptr<CollectiveContext>> contexts_;
    std::vector<std::optional<Status>> ends_;
  };

 private:
  struct Rank {
    std::unique_ptr<Loop> loop;  // after the fabric's transfers are gone it may go too
    std::unique_ptr<Fabric> fabric;
  };

  bool step() {
    bool moved = false;
    std::vector<Rank*> order;
    for (Rank& rank : ranks_) order.push_back(&rank);
    std::shuffle(order.begin(), order.end(), random_);
    for (Rank* rank : order) {
      if (rank->fabric->progress()) moved = true;
      if (rank->loop->run_ready(static_cast<int>(random_() % 4 + 1)) > 0) moved = true;
      if (rank->loop->has_ready()) moved = true;
    }
    return moved;
  }

  void on_control(int /*peer*/, std::span<const std::byte> /*message*/) override {}
  void on_peer_lost(int /*peer*/, const Status& status) override { ADD_FAILURE() << status.text(); }
  void on_goodbye(int /*peer*/) override {}

  std::mt19937_64& random_;
  Settings settings_;
  SteadyClock clock_;
  IdlePoller poller_;
  InprocNetwork network_;
  MembershipRef membership_;
  std::vector<Rank> ranks_;
  std::uint64_t next_call_ = 0;
};

}  // namespace hvd::testing
