// Graph capture: entries of capturing streams, and their replay.
#include <algorithm>
#include <map>

#include "tests/support/fake_device_parts.h"

namespace hvd::testing {
namespace {

/// Whether all work of the other lanes comes before the end of lane 0.
bool is_joined(const FakeCapture& capture) {
  std::vector<VectorClock> clocks(capture.streams.size(), VectorClock(capture.streams.size()));
  std::map<const FakeEventPoint*, VectorClock> points;
  for (const FakeCapturedEntry& entry : capture.entries) {
    VectorClock& clock = clocks[entry.lane];
    if (entry.launch) ++clock[entry.lane];
    if (entry.record) points[entry.record.get()] = clock;
    if (entry.wait) join(clock, points[entry.wait.get()]);
  }
  for (std::size_t lane = 0; lane < clocks.size(); ++lane) {
    if (clocks[0][lane] < clocks[lane][lane]) return false;
  }
  return true;
}

}  // namespace

Status FakeDevice::begin_capture(DeviceStream stream, bool blocking) {
  const Lock lock(fake_mutex());
  const Result<FakeStream*> found = stream_locked(stream);
  if (!found) return found.status();
  if (stream == nullptr || found.value()->capture) return Status::invalid_argument("this stream cannot be captured");
  auto capture = std::make_shared<FakeCapture>();
  capture->streams.push_back(found.value());
  capture->device = this;
  capture->blocking = blocking;
  found.value()->capture = std::move(capture);
  found.value()->lane = 0;
  return {};
}

bool FakeDevice::is_closed_locked(const FakeStream& stream) const {
  if (stream.index >= static_cast<std::size_t>(settings_.devices)) return false;
  return std::ranges::any_of(streams_, [&](const auto& other) {
    return other->device == stream.device && other->capture && other->capture->blocking;
  });
}

Result<FakeGraphRef> FakeDevice::end_capture(DeviceStream stream) {
  const Lock lock(fake_mutex());
  const Result<FakeStream*> found = stream_locked(stream);
  if (!found) return found.status();
  const FakeGraphRef graph = found.value()->capture;
  if (!graph || graph->streams[0] != found.value()) return Status::invalid_argument("this stream began no capture");
  for (FakeStream* part : graph->streams) part->capture.reset();
  graph->ended = true;
  HVD_RETURN_IF_ERROR(graph->invalid);
  if (!is_joined(*graph)) return Status::internal("the capture ended with work of a stream that was not joined");
  return graph;
}

Status FakeDevice::replay(const FakeGraphRef& graph, DeviceStream stream) {
  const Lock lock(fake_mutex());
  const Result<FakeStream*> found = stream_locked(stream);
  if (!found) return found.status();
  if (graph->device != this || found.value()->capture) return Status::invalid_argument("no replay on this stream");
  std::vector<FakeStream*>& others = graph->replay_streams;
  while (others.size() + 1 < graph->streams.size()) others.push_back(add_stream_locked(found.value()->device));
  std::map<const FakeEventPoint*, std::shared_ptr<FakeEventPoint>> points;
  if (graph->last_replay) found.value()->queue.push_back({{}, {}, graph->last_replay, host_clock_});
  for (const FakeCapturedEntry& entry : graph->entries) {
    FakeStream& on = entry.lane == 0 ? *found.value() : *others[entry.lane - 1];
    if (entry.launch) push_work_locked(on, entry.launch);
    if (entry.record) {
      points[entry.record.get()] = std::make_shared<FakeEventPoint>();
      on.queue.push_back({{}, points[entry.record.get()], {}, host_clock_});
    }
    if (entry.wait) on.queue.push_back({{}, {}, points[entry.wait.get()], host_clock_});
  }
  graph->last_replay = std::make_shared<FakeEventPoint>();
  found.value()->queue.push_back({{}, graph->last_replay, {}, host_clock_});
  fake_changed_locked();
  return {};
}

}  // namespace hvd::testing
