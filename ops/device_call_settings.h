// Which call on device memory it is, and what its work waits for.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/loop/loop.h"
#include "ops/device/device_events.h"

namespace hvd {

struct DeviceCallSettings {
  std::uint16_t process_set = 0;
  std::uint64_t call = 0;
  std::vector<std::int64_t> devices;              ///< of each rank of the set, as all have agreed
  std::shared_ptr<const std::vector<int>> ranks;  ///< of the set: global ranks, ascending
  Priority priority = 0;
  int device = 0;
  bool captured = false;             ///< becomes part of a graph
  bool hierarchical = false;         ///< NCCL joins the ranks of each host alone; the set has a hierarchy
  std::vector<DeviceMarkRef> ready;  ///< of the inputs, with events
  /// Where the caller waits for this one call: it goes on the stream that made its input, and nothing has to be
  /// ordered.
  bool on_producer = false;
  DeviceStream producer = nullptr;
};

}  // namespace hvd
