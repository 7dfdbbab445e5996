#include "ops/transport/tcp/tcp_link.h"

#include <fmt/format.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "ops/transport/byte_ring.h"
#include "ops/transport/frame.h"
#include "ops/transport/tcp/socket.h"

namespace hvd {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{256} << 10;
constexpr std::size_t kDrainBytes = std::size_t{4} << 20;

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

// A close with unread bytes resets the connection, and the reset may overtake what this rank sent last.
void drain(int fd) {
  std::array<std::byte, 16 << 10> unread;
  for (std::size_t total = 0; total < kDrainBytes;) {
    const ssize_t count = ::recv(fd, unread.data(), unread.size(), MSG_DONTWAIT);
    if (count <= 0) return;
    total += static_cast<std::size_t>(count);
  }
}

}  // namespace

Result<std::unique_ptr<TcpWakeup>> TcpWakeup::create() {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return errno_status("epoll_create1");
  return std::unique_ptr<TcpWakeup>(new TcpWakeup(std::move(epoll)));
}

void TcpWakeup::refresh() {
  // Edges beyond these stay with the kernel, which keeps fd() readable.
  std::array<epoll_event, 64> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    static_cast<TcpLink*>(event.data.ptr)->take_events(event.events);
  }
}

Result<std::unique_ptr<TcpLink>> TcpLink::create(TcpWakeup& wakeup, UniqueFd socket) {
  HVD_RETURN_IF_ERROR(adopt_socket(socket.get()));
  HVD_RETURN_IF_ERROR(tune_connection(socket.get()));
  std::unique_ptr<TcpLink> link(new TcpLink(wakeup, std::move(socket)));
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.ptr = link.get();
  if (::epoll_ctl(wakeup.fd(), EPOLL_CTL_ADD, link->socket_.get(), &event) != 0) return errno_status("epoll_ctl");
  return link;
}

TcpLink::TcpLink(TcpWakeup& wakeup, UniqueFd socket)
    : wakeup_(wakeup),
      socket_(std::move(socket)),
      address_(peer_text(socket_.get())),
      buffer_(static_cast<std::byte*>(::operator new(kBufferBytes, std::align_val_t(64)))) {}

TcpLink::~TcpLink() {
  drain(socket_.get());
  // A forked child may hold a copy of the socket, which would keep it, and a dangling pointer, in the set.
  ::epoll_ctl(wakeup_.fd(), EPOLL_CTL_DEL, socket_.get(), nullptr);
}

void TcpLink::take_events(std::uint32_t events) {
  if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) closing_ = true;
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) readable_ = !ended_;
  if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) blocked_ = false;
}

std::size_t TcpLink::write_some(std::span<const std::byte> bytes) {
  if (blocked_ || ended_ || write_error_ != 0 || bytes.empty()) return 0;
  ssize_t count = 0;
  do {
    count = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  } while (count < 0 && errno == EINTR);
  if (count >= 0) {
    blocked_ = static_cast<std::size_t>(count) < bytes.size();
    return static_cast<std::size_t>(count);
  }
  if (would_block(errno)) {
    blocked_ = true;
  } else {
    write_error_ = errno;  // told once what the peer sent before has been read
    readable_ = true;
    closing_ = true;
  }
  return 0;
}

std::span<const std::byte> TcpLink::peek() {
  if (begin_ == end_ && readable_) {
    begin_ = end_ = static_cast<std::size_t>((position_ + kRingShiftBytes) % kFrameAlignment);
    end_ += receive({buffer_.get() + begin_, kBufferBytes - begin_});
  }
  return {buffer_.get() + begin_, end_ - begin_};
}

void TcpLink::consume(std::size_t count) {
  begin_ += count;
  position_ += count;
}

std::size_t TcpLink::read_into(std::span<std::byte> place) {
  if (begin_ != end_ || !readable_ || place.empty()) return 0;
  const std::size_t count = receive(place);
  position_ += count;
  return count;
}

std::size_t TcpLink::receive(std::span<std::byte> place) {
  ssize_t count = 0;
  do {
    count = ::recv(socket_.get(), place.data(), place.size(), 0);
  } while (count < 0 && errno == EINTR);
  if (count > 0) {
    // A short read has emptied the socket; what comes later makes a new edge. The end of the stream makes none after
    // the one that announced it.
    if (static_cast<std::size_t>(count) < place.size() && !closing_) readable_ = false;
    return static_cast<std::size_t>(count);
  }
  if (count == 0) {
    end(0);
  } else if (!would_block(errno)) {
    end(errno);
  } else if (write_error_ != 0) {
    end(write_error_);
  } else {
    readable_ = false;
  }
  return 0;
}

void TcpLink::end(int error) {
  ended_ = true;
  readable_ = false;
  end_error_ = write_error_ != 0 ? write_error_ : error;
}

Status TcpLink::failure() {
  if (!ended_ || begin_ != end_) return {};
  if (end_error_ == 0) return Status::internal(fmt::format("{} closed the connection; its process has gone", address_));
  return Status::internal(fmt::format("the connection to {} broke: {}", address_, std::strerror(end_error_)));
}

void TcpLink::close() { ::shutdown(socket_.get(), SHUT_RDWR); }

}  // namespace hvd
