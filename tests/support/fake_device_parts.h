// What a FakeDevice is made of: queues, places of events, captures. For the files of FakeDevice alone.
// All of it is guarded by the fakes' mutex.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/support/fake_device.h"

namespace hvd::testing {

using Lock = std::unique_lock<std::mutex>;

/// What an event stood for when it was recorded: a place in a stream.
struct FakeEventPoint {
  bool done = false;
  VectorClock clock;
  bool captured = false;
  std::weak_ptr<FakeCapture> capture;  ///< gone once nobody holds the graph
};

struct FakeEvent {
  int device = 0;
  bool destroyed = false;
  std::shared_ptr<FakeEventPoint> point;  ///< nullptr: never recorded
};

/// One of three in a queue: work, an event's place, a wait for one.
struct FakeEntry {
  std::shared_ptr<FakeWork> work;
  std::shared_ptr<FakeEventPoint> record;
  std::shared_ptr<FakeEventPoint> wait;
  VectorClock host_clock;  ///< what the host knew to be done when it put this on the stream
};

struct FakeCapturedEntry {
  std::size_t lane = 0;
  FakeLaunch launch;
  std::shared_ptr<FakeEventPoint> record;
  std::shared_ptr<FakeEventPoint> wait;
};

/// What all fakes of the process share.
struct FakeProcess {
  std::mutex mutex;
  std::condition_variable_any changed;
  std::uint64_t changes = 0;
  std::map<DeviceStream, FakeDevice*> devices;
};

FakeProcess& process();

struct FakeStream {
  int device = 0;
  std::size_t index = 0;
  bool destroyed = false;
  std::deque<FakeEntry> queue;
  VectorClock clock;
  std::shared_ptr<FakeCapture> capture;
  std::size_t lane = 0;  ///< in the capture
};

/// First a capture, then a graph.
struct FakeCapture {
  std::vector<FakeStream*> streams;  ///< by lane; that of lane 0 began the capture
  std::vector<FakeCapturedEntry> entries;
  Status invalid;
  bool ended = false;
  bool blocking = false;
  std::vector<FakeStream*> replay_streams;      ///< by lane, without lane 0
  std::shared_ptr<FakeEventPoint> last_replay;  ///< replays of one graph follow each other
  FakeDevice* device = nullptr;
};

}  // namespace hvd::testing
