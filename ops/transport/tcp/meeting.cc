#include "ops/transport/tcp/meeting.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <list>
#include <optional>

#include "common/rank_text.h"

namespace hvd {
namespace {

constexpr Duration kRetryTime = std::chrono::milliseconds(20);
// With several candidates, how long one that took the call may stay silent before the next is tried.
constexpr Duration kPatience = std::chrono::seconds(2);

// A call to one rank: connect, greet, hear the greeting; then the next candidate if that was not the rank.
class Call {
 public:
  Call(const TcpGreeting& own, const TcpCallee& callee) : own_(&own), callee_(&callee) {}

  int rank() const { return callee_->rank; }
  bool done() const { return done_; }
  int fd() const { return socket_ ? socket_->fd() : -1; }
  short wanted() const { return socket_->wanted(); }
  TimePoint next_try() const { return socket_ ? kNever : not_before_; }
  MessageSocket take() { return std::move(*socket_); }

  void advance(TimePoint now) {
    if (!socket_ && now >= not_before_) dial(now);
    if (!socket_) return;
    const bool impatient = callee_->candidates.size() > 1 && now - since_ > kPatience;
    if (!socket_->advance().ok() || impatient) return hang_up(now);
    const std::optional<std::vector<std::byte>> answer = socket_->take();
    if (!answer) return;
    const std::optional<TcpGreeting> heard = decode_tcp_greeting(*answer);
    if (!heard || !belongs(*heard, *own_) || heard->rank != callee_->rank) return hang_up(now);
    done_ = true;
  }

 private:
  void dial(TimePoint now) {
    const SocketAddress& address = callee_->candidates[candidate_ % callee_->candidates.size()];
    Result<UniqueFd> made = make_socket(address.family());
    if (!made) return hang_up(now);
    UniqueFd fd = std::move(made).value();
    if (::connect(fd.get(), address.data(), address.bytes()) != 0 && errno != EINPROGRESS) return hang_up(now);
    socket_.emplace(std::move(fd), kMaxGreetingBytes);
    socket_->queue(encode_tcp_greeting(*own_));
    since_ = now;
  }

  void hang_up(TimePoint now) {
    socket_.reset();
    ++candidate_;
    // A round of all candidates, then a pause: the other rank may not be there yet.
    not_before_ = candidate_ % callee_->candidates.size() == 0 ? now + kRetryTime : now;
  }

  const TcpGreeting* own_;
  const TcpCallee* callee_;
  std::size_t candidate_ = 0;
  std::optional<MessageSocket> socket_;
  TimePoint since_{};
  TimePoint not_before_{};
  bool done_ = false;
};

std::string missing_text(const std::set<int>& expected, const std::list<Call>& calls,
                         const std::vector<TcpCallee>& callees) {
  std::vector<int> ranks(expected.begin(), expected.end());
  std::string where;
  for (const Call& call : calls) {
    if (call.done()) continue;
    ranks.push_back(call.rank());
    for (const TcpCallee& callee : callees) {
      if (callee.rank != call.rank()) continue;
      for (const SocketAddress& address : callee.candidates) where += (where.empty() ? "" : ", ") + address.text();
    }
  }
  std::sort(ranks.begin(), ranks.end());
  return fmt::format("{} did not come in time{}", rank_text(ranks),
                     where.empty() ? std::string() : fmt::format(" (looked for at {})", where));
}

class Meeting {
 public:
  Meeting(const TcpGreeting& own, int listener, std::set<int> expected, const std::vector<TcpCallee>& callees)
      : own_(own), listener_(listener), expected_(std::move(expected)), callees_(callees) {
    for (const TcpCallee& callee : callees) calls_.emplace_back(own, callee);
  }

  Result<std::map<int, MessageSocket>> run(TimePoint deadline) {
    for (;;) {
      const TimePoint now = SteadyClock().now();
      accept_callers();
      for (Call& call : calls_) {
        if (!call.done()) call.advance(now);
      }
      for (auto caller = callers_.begin(); caller != callers_.end();) {
        caller = listen_to(*caller) ? std::next(caller) : callers_.erase(caller);
      }
      if (complete()) return take_all();
      if (now >= deadline) return Status::deadline_exceeded(missing_text(expected_, calls_, callees_));
      wait(deadline);
    }
  }

 private:
  void accept_callers() {
    if (listener_ < 0) return;
    for (;;) {
      UniqueFd socket(::accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket) return;
      callers_.emplace_back(std::move(socket), kMaxGreetingBytes);
    }
  }

  // False when the caller is done with: met, gone or a stranger.
  bool listen_to(MessageSocket& caller) {
    if (!caller.advance().ok()) return false;
    const std::optional<std::vector<std::byte>> said = caller.take();
    if (!said) return true;
    const std::optional<TcpGreeting> heard = decode_tcp_greeting(*said);
    if (!heard || !belongs(*heard, own_) || expected_.erase(heard->rank) == 0) return false;
    caller.queue(encode_tcp_greeting(own_));
    if (caller.write().ok() && caller.flushed()) {
      met_.emplace(heard->rank, std::move(caller));
    } else {
      expected_.insert(heard->rank);  // it will call again
    }
    return false;
  }

  bool complete() const {
    return expected_.empty() && std::all_of(calls_.begin(), calls_.end(), [](const Call& c) { return c.done(); });
  }

  std::map<int, MessageSocket> take_all() {
    for (Call& call : calls_) met_.emplace(call.rank(), call.take());
    return std::move(met_);
  }

  void wait(TimePoint deadline) {
    PollSet poll;
    if (listener_ >= 0) poll.add(listener_, POLLIN);
    TimePoint until = std::min(deadline, SteadyClock().now() + kPatience);
    for (const Call& call : calls_) {
      if (call.done()) continue;
      until = std::min(until, call.next_try());
      if (call.fd() >= 0) poll.add(call.fd(), call.wanted());
    }
    for (const MessageSocket& caller : callers_) poll.add(caller.fd(), caller.wanted());
    poll.wait(until);
  }

  const TcpGreeting& own_;
  int listener_;
  std::set<int> expected_;
  const std::vector<TcpCallee>& callees_;
  std::list<Call> calls_;
  std::list<MessageSocket> callers_;
  std::map<int, MessageSocket> met_;
};

}  // namespace

Result<std::map<int, MessageSocket>> meet(const TcpGreeting& own, int listener, std::set<int> expected,
                                          const std::vector<TcpCallee>& callees, TimePoint deadline) {
  return Meeting(own, listener, std::move(expected), callees).run(deadline);
}

}  // namespace hvd
