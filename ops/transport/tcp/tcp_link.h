// A link to one peer over one socket, and the epoll set that wakes the owner of all of them.
// Runs under the Turn.
//
// The sockets are watched edge-triggered, once and for all: an edge is remembered in its link until a read or a write
// has found the end of it, so nothing is missed, and a link that nobody reads any more cannot keep its owner awake.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "common/unique_fd.h"
#include "ops/transport/link.h"

namespace hvd {

class TcpWakeup final : public Wakeup {
 public:
  /// Fails when the process has run out of descriptors.
  static Result<std::unique_ptr<TcpWakeup>> create();

  int fd() const override { return epoll_.get(); }
  void set_sleeping(bool /*sleeping*/) override {}  // the kernel rings
  void refresh() override;

 private:
  friend class TcpLink;
  explicit TcpWakeup(UniqueFd epoll) : epoll_(std::move(epoll)) {}

  UniqueFd epoll_;
};

class TcpLink final : public Link {
 public:
  /// Takes over a connected socket. `wakeup` outlives the link.
  static Result<std::unique_ptr<TcpLink>> create(TcpWakeup& wakeup, UniqueFd socket);
  ~TcpLink() override;
  TcpLink(const TcpLink&) = delete;
  TcpLink& operator=(const TcpLink&) = delete;

  std::size_t write_some(std::span<const std::byte> bytes) override;
  std::span<const std::byte> peek() override;
  void consume(std::size_t count) override;
  std::size_t read_into(std::span<std::byte> place) override;
  void ring() override {}
  bool has_news() override { return begin_ != end_ || readable_ || ended_; }
  Status failure() override;
  void close() override;

 private:
  friend class TcpWakeup;
  struct FreeAligned {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };

  TcpLink(TcpWakeup& wakeup, UniqueFd socket);
  void take_events(std::uint32_t events);
  std::size_t receive(std::span<std::byte> place);
  void end(int error);

  TcpWakeup& wakeup_;
  UniqueFd socket_;
  std::string address_;
  std::unique_ptr<std::byte, FreeAligned> buffer_;  // bytes begin_..end_ have arrived and were not consumed
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::uint64_t position_ = 0;  // of begin_ in the stream
  bool readable_ = true;        // until a read finds nothing
  bool closing_ = false;        // the end of the stream is in sight: read on until it comes
  bool blocked_ = false;        // the socket took no more; its next edge ends that
  bool ended_ = false;
  int write_error_ = 0;
  int end_error_ = 0;  // 0: closed in order by the other side
};

}  // namespace hvd
