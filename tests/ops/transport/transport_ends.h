// The ends of a transport under test: one per rank, with what it was told, all driven by the thread of the test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "common/loop/poller.h"
#include "ops/transport/stream_transport.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {

using Bytes = std::vector<std::byte>;

/// Bytes that tell where they belong: another `salt` gives others.
inline Bytes pattern(std::size_t size, std::size_t salt) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i)
    bytes[i] = static_cast<std::byte>((i * 2654435761u + salt * 97 + (i >> 8)) >> 3);
  return bytes;
}

inline Bytes bytes_of(std::string_view text) {
  Bytes bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

/// Counts what ends a sleep.
class CountingPoller final : public Poller {
 public:
  Status watch(int /*fd*/) override { return {}; }
  void unwatch(int /*fd*/) override {}
  void wait(TimePoint deadline) override {
    std::unique_lock lock(mutex_);
    rung_.wait_until(lock, deadline, [this] { return wakes_ > waited_; });
    waited_ = wakes_;
  }
  void wake() override {
    const std::lock_guard lock(mutex_);
    ++wakes_;
    rung_.notify_all();
  }
  int wakes() {
    const std::lock_guard lock(mutex_);
    return wakes_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable rung_;
  int wakes_ = 0;
  int waited_ = 0;
};

/// One rank: its transport, and what it was told.
class End final : public TransportEvents {
 public:
  explicit End(int own_rank) : rank(own_rank) {}

  void on_control(int peer, std::span<const std::byte> message) override {
    control.emplace_back(peer, Bytes(message.begin(), message.end()));
  }
  void on_peer_lost(int peer, const Status& status) override { lost.emplace_back(peer, status); }
  void on_goodbye(int peer) override { goodbyes.push_back(peer); }

  void use(std::unique_ptr<Transport> given) {
    transport = std::move(given);
    transport->set_events(*this);
  }

  TransferRef send(int to, const TransferKey& key, std::span<const std::byte> bytes,
                   std::shared_ptr<void> keep_alive = nullptr) {
    auto transfer = std::make_shared<Transfer>(loop, 0);
    transfer->direction = Transfer::Direction::kSend;
    transfer->peer = to;
    transfer->key = key;
    transfer->bytes = bytes.size();
    transfer->may_be_pulled = bytes.size() >= pull_from;
    transfer->data = bytes.data();
    transfer->keep_alive = std::move(keep_alive);
    transport->start(transfer);
    return transfer;
  }
  TransferRef receive(int from, const TransferKey& key, std::span<std::byte> place) {
    auto transfer = std::make_shared<Transfer>(loop, 0);
    transfer->direction = Transfer::Direction::kReceive;
    transfer->peer = from;
    transfer->key = key;
    transfer->bytes = place.size();
    transfer->may_be_pulled = place.size() >= pull_from;
    transfer->arrival.out = place.data();
    transport->start(transfer);
    return transfer;
  }
  TransferRef receive(int from, const TransferKey& key, std::size_t bytes, const Arrival& arrival) {
    auto transfer = std::make_shared<Transfer>(loop, 0);
    transfer->direction = Transfer::Direction::kReceive;
    transfer->peer = from;
    transfer->key = key;
    transfer->bytes = bytes;
    transfer->may_be_pulled = bytes >= pull_from;
    transfer->arrival = arrival;
    transport->start(transfer);
    return transfer;
  }

  int rank;
  std::size_t pull_from = SIZE_MAX;  ///< transfers of so many bytes may be pulled
  SteadyClock clock;
  CountingPoller poller;
  Loop loop{clock};
  std::unique_ptr<Transport> transport;
  std::vector<std::pair<int, Bytes>> control;
  std::vector<std::pair<int, Status>> lost;
  std::vector<int> goodbyes;
};

/// All ranks of a job.
class Ends {
 public:
  explicit Ends(int size) {
    for (int rank = 0; rank < size; ++rank) ends_.push_back(std::make_unique<End>(rank));
  }
  End& operator[](int rank) { return *ends_[static_cast<std::size_t>(rank)]; }
  int size() const { return static_cast<int>(ends_.size()); }

  /// Drives every rank that has a transport, once. True when anything moved.
  bool step() {
    bool moved = false;
    for (const auto& end : ends_) {
      if (end->transport && end->transport->progress()) moved = true;
    }
    return moved;
  }
  /// Drives all until `condition` holds. False when that took longer than a minute.
  bool drive_until(const std::function<bool()>& condition) {
    const TimePoint deadline = SteadyClock().now() + std::chrono::seconds(60);
    while (!condition()) {
      if (!step() && SteadyClock().now() > deadline) return false;
    }
    return true;
  }
  bool drive_until_done(const std::vector<TransferRef>& transfers) {
    return drive_until([&] {
      return std::all_of(transfers.begin(), transfers.end(), [](const TransferRef& one) { return one->done(); });
    });
  }
  /// Sends a control message each way between all pairs, and waits for them: every pair is alive in both directions,
  /// and the control messages before it have arrived.
  bool all_hear_each_other() {
    const Bytes mark = bytes_of("mark" + std::to_string(++marks_));
    for (const auto& from : ends_) {
      for (const auto& to : ends_) {
        if (from != to && from->transport && to->transport) from->transport->post(to->rank, mark);
      }
    }
    const bool done = drive_until([&] {
      return std::all_of(ends_.begin(), ends_.end(), [&](const auto& to) {
        return std::all_of(ends_.begin(), ends_.end(), [&](const auto& from) {
          if (from == to || !from->transport || !to->transport) return true;
          const std::pair<int, Bytes> wanted{from->rank, mark};
          return std::find(to->control.rbegin(), to->control.rend(), wanted) != to->control.rend();
        });
      });
    });
    for (const auto& end : ends_) {
      std::erase_if(end->control, [&](const auto& message) { return message.second == mark; });
    }
    return done;
  }

 private:
  std::vector<std::unique_ptr<End>> ends_;
  int marks_ = 0;
};

}  // namespace hvd::testing
