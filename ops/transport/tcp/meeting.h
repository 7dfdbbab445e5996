// How ranks meet over TCP: some listen, the others call, and all say the job's token before anything else. Strangers
// are dropped. Used at init, by the thread that calls it; every wait has a deadline.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "ops/transport/tcp/message_socket.h"

namespace hvd {

/// Where a rank may be found; the candidates are tried in turn until one answers as that rank.
struct TcpCallee {
  int rank = 0;
  std::vector<SocketAddress> candidates;
};

/// Meets the ranks `expected` (they call `listener`; -1: nobody does) and `callees` (this rank calls them).
/// Blocks; returns a connection for each by rank. kDeadlineExceeded names who has not come, and where they were looked
/// for.
Result<std::map<int, MessageSocket>> meet(const TcpGreeting& own, int listener, std::set<int> expected,
                                          const std::vector<TcpCallee>& callees, TimePoint deadline);

}  // namespace hvd
