// The devices of one rank, as its engine uses them: a stream on each, the order of what is put on them, and what has to
// be kept until a device is done with it.
// The three of the first part from any thread; everything else runs under the Turn.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "common/loop/loop.h"
#include "ops/device/device_events.h"
#include "ops/device/device_memory.h"
#include "ops/device/launch_order.h"

namespace hvd {

class DeviceEngine {
 public:
  DeviceEngine(Loop& loop, DeviceRuntime& runtime);
  DeviceEngine(const DeviceEngine&) = delete;
  DeviceEngine& operator=(const DeviceEngine&) = delete;
  ~DeviceEngine();

  DeviceRuntime& runtime() { return runtime_; }
  DeviceEvents& events() { return events_; }
  DeviceMemory& memory() { return memory_; }

  /// The stream of a device, made at its first use. What becomes part of a graph goes to one of its own, so that what
  /// others do meanwhile does not.
  Result<DeviceStream> stream(int device, bool captured);
  LaunchOrder& order() { return order_; }

  /// Holds `held` until what `mark` stands for is done, and for ever if that is a part of a graph, which may run again.
  /// What is returned lives as long. The stream of a mark without an event has to live for some milliseconds more.
  std::weak_ptr<void> keep(DeviceMarkRef mark, std::shared_ptr<void> held);
  void keep_for_good(std::shared_ptr<void> held) { kept_for_good_.push_back(std::move(held)); }
  /// What a device has in line: a mark for each stream that can be marked now.
  std::vector<DeviceMarkRef> in_line(int device);
  /// Whether something is held that a device is not done with.
  bool pending() const { return in_line_ > 0; }
  /// Whether so much is in line that more had better wait: what is in line has to go through a device even when it has
  /// become of no use, and CUDA blocks who puts much more there.
  bool crowded() const { return in_line_ >= kMostInLine; }
  /// Looks what the devices are done with.
  void look();
  /// Called now and then while something is pending.
  void set_watch(std::function<void()> watch) { watch_ = std::move(watch); }
  /// Nothing is asked of the devices any more. What is held is let go, but for what a device may still be at work on:
  /// that is left to the process, as nobody looks any more.
  void abandon();

 private:
  static constexpr std::size_t kMostInLine = 128;  // calls

  struct Kept {
    DeviceMarkRef mark;
    std::shared_ptr<std::shared_ptr<void>> held;
  };

  using Line = std::deque<Kept>;  // of one stream: what comes later is done later

  bool front_is_done(Line& line);
  void look_later();

  Loop& loop_;
  DeviceRuntime& runtime_;
  DeviceEvents events_;
  DeviceMemory memory_;
  LaunchOrder order_;
  std::map<std::pair<int, bool>, DeviceStream> streams_;  // by device and whether it is for graphs
  std::map<std::pair<int, DeviceStream>, Line> kept_;     // by device and stream; no empty ones
  std::size_t in_line_ = 0;                               // all of them
  std::vector<std::shared_ptr<void>> kept_for_good_;
  std::function<void()> watch_;
  Loop::TimerId timer_ = 0;
  Duration pause_{};
  bool left_ = false;  // abandoned with work pending, which may never end
};

}  // namespace hvd
