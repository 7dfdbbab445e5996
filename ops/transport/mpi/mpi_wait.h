// Waits for MPI requests at start and at exit, with a limit: MPI has nothing that a thread could sleep on.
// Used by the thread that runs init, and at exit.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

#include "common/clock.h"

namespace hvd {

/// Asks `finished` (which lets MPI work) until it says true or `deadline` has passed: at first without a pause, so that
/// ranks that come together lose nothing, later every millisecond, so that a long wait costs no processor.
/// False at the deadline.
template <typename Finished>
bool wait_for_mpi(TimePoint deadline, Finished finished) {
  constexpr auto kLongestPause = std::chrono::microseconds(1000);
  std::chrono::microseconds pause{0};
  const TimePoint patient = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
  while (!finished()) {
    const TimePoint now = std::chrono::steady_clock::now();
    if (now >= deadline) return false;
    if (now < patient) {
      std::this_thread::yield();
    } else {
      pause = std::min(kLongestPause, pause + std::chrono::microseconds(20));
      std::this_thread::sleep_for(pause);
    }
  }
  return true;
}

}  // namespace hvd
