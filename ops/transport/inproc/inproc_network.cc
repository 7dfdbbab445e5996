#include "ops/transport/inproc/inproc_network.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <utility>

#include "common/check.h"
#include "common/guarded.h"
#include "ops/transport/byte_ring.h"

namespace hvd {

struct InprocNetwork::Rank {
  std::atomic<bool> sleeping{false};
  std::atomic<bool> gone{false};
  Guarded<Poller*> poller{nullptr};

  void wake() {
    poller.with([](Poller* sleeper) {
      if (sleeper != nullptr) sleeper->wake();
    });
  }
};

// Not touched before it is used.
struct InprocNetwork::Memory {
  explicit Memory(std::size_t bytes)
      : place(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(64)))), size(bytes) {}
  ~Memory() { ::operator delete(place, std::align_val_t(64)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* place;
  std::size_t size;
};

struct InprocNetwork::Ring {
  explicit Ring(std::size_t bytes) : memory(bytes) {}

  ByteRingControl control;
  Memory memory;
  std::atomic<bool> closed{false};        // by its writer
  Guarded<bool> memory_is_closed{false};  // of the writer; held while the reader pulls from it
};

class InprocLink final : public Link {
 public:
  InprocLink(std::shared_ptr<InprocNetwork::Rank> peer, std::shared_ptr<InprocNetwork::Ring> out,
             std::shared_ptr<InprocNetwork::Ring> in, bool pulls)
      : peer_(std::move(peer)),
        out_(std::move(out)),
        in_(std::move(in)),
        writer_(out_->control, {out_->memory.place, out_->memory.size}),
        reader_(in_->control, {in_->memory.place, in_->memory.size}),
        pulls_(pulls) {}

  std::size_t write_some(std::span<const std::byte> bytes) override {
    const std::size_t count = writer_.write_some(bytes);
    if (count > 0) wrote_ = true;
    return count;
  }
  std::span<const std::byte> peek() override { return reader_.peek(); }
  void consume(std::size_t count) override {
    reader_.consume(count);
    if (reader_.writer_is_blocked()) made_room_ = true;
  }
  bool can_pull() const override { return pulls_; }
  Pulled pull(std::uint64_t address, std::span<std::byte> place) override {
    return in_->memory_is_closed.with([&](const bool& closed) {
      if (closed || peer_->gone.load()) return Pulled::kGone;
      if (!place.empty()) std::memcpy(place.data(), reinterpret_cast<const std::byte*>(address), place.size());
      return Pulled::kAll;
    });
  }
  void ring() override {
    const bool unread = std::exchange(wrote_, false) && !writer_.all_read();
    const bool nudged = std::exchange(nudged_, false);
    if ((std::exchange(made_room_, false) || unread || nudged) && peer_->sleeping.load()) peer_->wake();
  }
  void nudge() override { nudged_ = true; }
  bool has_news() override {
    return !reader_.peek().empty() || (writer_.blocked() && writer_.has_room()) || peer_has_ended();
  }
  Status failure() override {
    if (!peer_has_ended() || !reader_.peek().empty()) return {};
    return Status::internal(peer_->gone.load() ? "its process has gone" : "it has closed the connection");
  }
  bool peer_has_ended() const override { return peer_->gone.load() || in_->closed.load(); }
  void close() override {
    out_->memory_is_closed.with([](bool& closed) { closed = true; });
    out_->closed.store(true);
    peer_->wake();
  }

 private:
  std::shared_ptr<InprocNetwork::Rank> peer_;
  std::shared_ptr<InprocNetwork::Ring> out_;
  std::shared_ptr<InprocNetwork::Ring> in_;
  ByteRingWriter writer_;
  ByteRingReader reader_;
  bool pulls_;
  bool nudged_ = false;
  bool wrote_ = false;      // since the last ring
  bool made_room_ = false;  // for a writer that found none
};

class InprocWakeup final : public Wakeup {
 public:
  InprocWakeup(std::vector<std::shared_ptr<InprocNetwork::Rank>> ranks, int self)
      : ranks_(std::move(ranks)), self_(*ranks_[static_cast<std::size_t>(self)]) {}
  ~InprocWakeup() override {
    self_.poller.with([](Poller*& poller) { poller = nullptr; });
    self_.gone.store(true);
    for (const auto& rank : ranks_) rank->wake();
  }

  int fd() const override { return -1; }
  void set_sleeping(bool sleeping) override { self_.sleeping.store(sleeping); }
  void refresh() override {}

 private:
  std::vector<std::shared_ptr<InprocNetwork::Rank>> ranks_;
  InprocNetwork::Rank& self_;
};

InprocNetwork::InprocNetwork(int size, std::size_t ring_bytes, bool pulls, std::size_t slot_bytes)
    : ring_bytes_(std::bit_ceil(ring_bytes)), pulls_(pulls), slot_bytes_(slot_bytes) {
  const auto ranks = static_cast<std::size_t>(size);
  for (std::size_t i = 0; i < ranks; ++i) ranks_.push_back(std::make_shared<Rank>());
  for (std::size_t i = 0; i < ranks * ranks; ++i) rings_.push_back(std::make_shared<Ring>(ring_bytes_));
  blocks_ = std::make_shared<Memory>(ranks * block_bytes(slot_bytes_));
  for (std::size_t i = 0; i < ranks; ++i) {
    std::construct_at(reinterpret_cast<BlockWords*>(blocks_->place + i * block_bytes(slot_bytes_)));
  }
}

InprocNetwork::~InprocNetwork() = default;

std::unique_ptr<StreamTransport> InprocNetwork::connect(int rank, Poller& poller, StreamTransport::Settings settings) {
  const auto self = static_cast<std::size_t>(rank);
  const std::size_t ranks = ranks_.size();
  ranks_[self]->poller.with([&](Poller*& place) { place = &poller; });
  settings.name = "in-process";
  settings.rank = rank;
  settings.size = size();
  auto transport = std::make_unique<StreamTransport>(std::move(settings), std::make_unique<InprocWakeup>(ranks_, rank));
  for (std::size_t peer = 0; peer < ranks; ++peer) {
    if (peer == self) continue;
    transport->add_peer(static_cast<int>(peer), std::make_unique<InprocLink>(ranks_[peer], rings_[self * ranks + peer],
                                                                             rings_[peer * ranks + self], pulls_));
  }
  auto shared = std::make_unique<SharedBlocks>(rank, size(), slot_bytes_, blocks_);
  const std::size_t bytes = block_bytes(slot_bytes_);
  for (std::size_t i = 0; i < ranks; ++i) shared->add(static_cast<int>(i), {blocks_->place + i * bytes, bytes});
  transport->share_blocks(std::move(shared));
  return transport;
}

}  // namespace hvd
