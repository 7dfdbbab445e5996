#include "tests/support/fake_device.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "common/check.h"
#include "tests/support/fake_conversion.h"
#include "tests/support/fake_device_parts.h"

namespace hvd::testing {

FakeProcess& process() {
  static FakeProcess instance;
  return instance;
}

FakeCurrent& fake_current() {
  thread_local FakeCurrent current;
  return current;
}

std::mutex& fake_mutex() { return process().mutex; }

void fake_changed_locked() {
  ++process().changes;
  process().changed.notify_all();
}

bool fake_wait_locked(std::unique_lock<std::mutex>& lock, const std::function<bool()>& condition) {
  return process().changed.wait_for(lock, std::chrono::seconds(60), condition);
}

namespace {

std::vector<ByteRange> without_empty(const std::vector<ByteRange>& ranges) {
  std::vector<ByteRange> kept;
  std::ranges::copy_if(ranges, std::back_inserter(kept), [](const ByteRange& range) { return range.bytes > 0; });
  return kept;
}

}  // namespace

FakeDevice::FakeDevice(Settings settings) : settings_(settings), random_(settings.seed) {
  const Lock lock(fake_mutex());
  for (int device = 0; device < settings.devices; ++device) add_stream_locked(device);
}

FakeDevice::~FakeDevice() {
  stop();
  {
    const Lock lock(fake_mutex());
    for (auto& stream : streams_) {
      stream->queue.clear();
      process().devices.erase(stream.get());
    }
    for (void* memory : allocated_) std::free(memory);
    fake_changed_locked();
  }
  for (const std::string& violation : violations_) ADD_FAILURE() << "fake device: " << violation;
}

// Streams and events.

Result<int> FakeDevice::exchange_current(int device) {
  const Lock lock(fake_mutex());
  if (device != -1) HVD_RETURN_IF_ERROR(stream_locked(device, nullptr).status());
  return std::exchange(fake_current(), {device == -1 ? nullptr : this, device}).device;
}

FakeStream* FakeDevice::add_stream_locked(int device) {
  auto stream = std::make_unique<FakeStream>();
  stream->device = device;
  stream->index = streams_.size();
  process().devices[stream.get()] = this;
  streams_.push_back(std::move(stream));
  return streams_.back().get();
}

Result<FakeStream*> FakeDevice::stream_locked(DeviceStream stream) {
  if (stream == nullptr) return streams_[0].get();
  const auto found = std::ranges::find_if(streams_, [stream](const auto& ours) { return ours.get() == stream; });
  if (found == streams_.end() || (*found)->destroyed) {
    violation_locked(fmt::format("stream {} is not there, or no more", stream));
    return Status::invalid_argument("no such stream");
  }
  return found->get();
}

Result<FakeStream*> FakeDevice::stream_locked(int device, DeviceStream stream) {
  if (device < 0 || device >= settings_.devices) {
    violation_locked(fmt::format("there is no device {}", device));
    return Status::invalid_argument("no such device");
  }
  if (stream == nullptr) return streams_[static_cast<std::size_t>(device)].get();
  Result<FakeStream*> found = stream_locked(stream);
  if (found && found.value()->device != device) {
    violation_locked(fmt::format("stream {} of device {} is used with device {}", found.value()->index,
                                 found.value()->device, device));
    return Status::invalid_argument("stream of another device");
  }
  return found;
}

Result<FakeEvent*> FakeDevice::event_locked(int device, DeviceEvent event) {
  const auto found = std::ranges::find_if(events_, [event](const auto& ours) { return ours.get() == event; });
  if (found == events_.end() || (*found)->destroyed) {
    violation_locked(fmt::format("event {} is not there, or no more", event));
    return Status::invalid_argument("no such event");
  }
  if (device < 0 || device >= settings_.devices) {
    violation_locked(fmt::format("there is no device {}", device));
    return Status::invalid_argument("no such device");
  }
  return found->get();
}

Result<DeviceStream> FakeDevice::create_stream(int device) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kCreateStream));
  HVD_RETURN_IF_ERROR(stream_locked(device, nullptr).status());
  ++counts_.streams;
  return static_cast<DeviceStream>(add_stream_locked(device));
}

void FakeDevice::destroy_stream(int device, DeviceStream stream) {
  const Lock lock(fake_mutex());
  const Result<FakeStream*> found = stream_locked(device, stream);
  if (!found || stream == nullptr) return;
  if (found.value()->capture) violation_locked("a stream is destroyed while it is capturing");
  found.value()->destroyed = true;  // its queue goes on to its end, as CUDA's does
  --counts_.streams;
}

Result<bool> FakeDevice::is_capturing(int device, DeviceStream stream) {
  const Lock lock(fake_mutex());
  const Result<FakeStream*> found = stream_locked(device, stream);
  if (!found) return found.status();
  if (is_closed_locked(*found.value())) return Status::precondition("a stream that waits for it is being captured");
  return found.value()->capture != nullptr;
}

Result<DeviceEvent> FakeDevice::create_event(int device) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kCreateEvent));
  HVD_RETURN_IF_ERROR(stream_locked(device, nullptr).status());
  events_.push_back(std::make_unique<FakeEvent>());
  events_.back()->device = device;
  ++counts_.events;
  return static_cast<DeviceEvent>(events_.back().get());
}

void FakeDevice::destroy_event(int device, DeviceEvent event) {
  const Lock lock(fake_mutex());
  const Result<FakeEvent*> found = event_locked(device, event);
  if (!found) return;
  found.value()->destroyed = true;
  found.value()->point.reset();
  --counts_.events;
}

Status FakeDevice::record(int device, DeviceEvent event, DeviceStream stream) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kRecord));
  const Result<FakeEvent*> found_event = event_locked(device, event);
  const Result<FakeStream*> found = stream_locked(device, stream);
  HVD_RETURN_IF_ERROR(found_event.status());
  HVD_RETURN_IF_ERROR(found.status());
  FakeStream& on = *found.value();
  if (found_event.value()->device != on.device) {
    return Status::invalid_argument("event and stream are of different devices");
  }
  auto point = std::make_shared<FakeEventPoint>();
  found_event.value()->point = point;
  if (is_closed_locked(on)) violation_locked("an event is recorded on the default stream during a capture");
  if (on.capture) {
    point->captured = true;
    point->capture = on.capture;
    on.capture->entries.push_back({on.lane, {}, point, {}});
  } else {
    on.queue.push_back({{}, point, {}, host_clock_});
    fake_changed_locked();
  }
  return {};
}

Status FakeDevice::wait(int device, DeviceStream stream, DeviceEvent event) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kWait));
  const Result<FakeEvent*> found_event = event_locked(device, event);
  const Result<FakeStream*> found = stream_locked(device, stream);
  HVD_RETURN_IF_ERROR(found_event.status());
  HVD_RETURN_IF_ERROR(found.status());
  FakeStream& on = *found.value();
  const std::shared_ptr<FakeEventPoint>& point = found_event.value()->point;
  if (!point) return {};
  if (!point->captured) {
    if (on.capture) {
      on.capture->invalid = Status::internal("a capturing stream waited on an event from outside of the capture");
      return on.capture->invalid;
    }
    on.queue.push_back({{}, {}, point, host_clock_});
    fake_changed_locked();
    return {};
  }
  const std::shared_ptr<FakeCapture> capture = point->capture.lock();
  if (!capture || capture->ended) return Status::internal("wait on an event that was recorded in an ended capture");
  if (!on.capture) {
    on.capture = capture;
    on.lane = capture->streams.size();
    capture->streams.push_back(&on);
  } else if (on.capture != capture) {
    on.capture->invalid = capture->invalid = Status::internal("two captures were merged");
    return capture->invalid;
  }
  capture->entries.push_back({on.lane, {}, {}, point});
  return {};
}

Result<bool> FakeDevice::query(int device, DeviceEvent event) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kQuery));
  const Result<FakeEvent*> found = event_locked(device, event);
  if (!found) return found.status();
  const FakeEventPoint* point = found.value()->point.get();
  if (point == nullptr) return true;
  if (point->captured) return Status::internal("query of an event that was recorded in a capture");
  // The host now knows of it, and what it enqueues from here on is ordered after it.
  if (point->done) join(host_clock_, point->clock);
  return point->done;
}

// Memory.

Result<void*> FakeDevice::allocate_locked(FakeCall call, std::size_t bytes, std::size_t& alive) {
  constexpr std::size_t alignment = 256;
  if (const Status status = fault_locked(call); !status.ok()) {
    return Status(status.code(), fmt::format("{} ({} bytes)", status.text(), bytes));
  }
  const std::size_t padded = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, padded);
  HVD_CHECK(memory != nullptr);
  std::memset(memory, 0xdb, padded);  // fresh memory is not zero
  allocated_.insert(memory);
  checker_.add(memory, bytes);
  alive += bytes;
  ++counts_.allocations;
  return memory;
}

void FakeDevice::free_locked(void* memory, std::size_t& alive) {
  if (memory == nullptr) return;
  ++counts_.synchronising_calls;
  if (allocated_.erase(memory) == 0) {
    violation_locked(fmt::format("memory {} is freed, but was not allocated or is gone", memory));
    return;
  }
  const std::size_t bytes = checker_.remove(memory);
  const auto touches = [range = ByteRange{memory, bytes}](const ByteRange& other) { return overlap(range, other); };
  for (const auto& stream : streams_) {
    for (const FakeEntry& entry : stream->queue) {
      if (!entry.work) continue;
      if (std::ranges::any_of(entry.work->reads, touches) || std::ranges::any_of(entry.work->writes, touches)) {
        violation_locked(fmt::format("memory {} is freed while '{}' on stream {} still has to touch it", memory,
                                     entry.work->name, stream->index));
      }
    }
  }
  alive -= bytes;
  std::free(memory);
}

Result<void*> FakeDevice::allocate(int device, std::size_t bytes) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(stream_locked(device, nullptr).status());
  return allocate_locked(FakeCall::kAllocate, bytes, counts_.bytes);
}

void FakeDevice::free(int device, void* memory) {
  const Lock lock(fake_mutex());
  if (stream_locked(device, nullptr).ok()) free_locked(memory, counts_.bytes);
}

Result<void*> FakeDevice::allocate_pinned(std::size_t bytes) {
  const Lock lock(fake_mutex());
  return allocate_locked(FakeCall::kAllocatePinned, bytes, counts_.pinned_bytes);
}

void FakeDevice::free_pinned(void* memory) {
  const Lock lock(fake_mutex());
  free_locked(memory, counts_.pinned_bytes);
}

Result<int> FakeDevice::device_of(const void* memory) {
  const Lock lock(fake_mutex());
  if (checker_.find({memory, 1}) == 0) return Status::invalid_argument("not memory of a device");
  return 0;
}

void FakeDevice::adopt(const void* memory, std::size_t bytes) {
  const Lock lock(fake_mutex());
  checker_.add(memory, bytes);
}

void FakeDevice::forget(const void* memory) {
  const Lock lock(fake_mutex());
  checker_.remove(memory);
}

// Work.

Status FakeDevice::copy(int device, void* to, const void* from, std::size_t bytes, DeviceStream stream) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kCopy));
  HVD_RETURN_IF_ERROR(stream_locked(device, stream).status());
  if (bytes == 0) return {};
  FakeWork work{.name = "copy", .reads = {{from, bytes}}, .writes = {{to, bytes}}};
  if (overlap(work.reads[0], work.writes[0])) violation_locked(fmt::format("a copy to {} overlaps its source", to));
  work.run = [to, from, bytes] { std::memmove(to, from, bytes); };
  return enqueue_locked(stream, [work = std::move(work)] { return std::make_shared<FakeWork>(work); });
}

Status FakeDevice::convert(int device, const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                           DeviceStream stream) {
  const Lock lock(fake_mutex());
  HVD_RETURN_IF_ERROR(fault_locked(FakeCall::kConvert));
  HVD_RETURN_IF_ERROR(stream_locked(device, stream).status());
  if (!is_supported(conversion)) return Status::invalid_argument("no such conversion");
  FakeWork work{.name = "convert"};
  std::vector<DevicePiece> full;
  for (const DevicePiece& piece : pieces) {
    if (piece.count == 0) continue;
    full.push_back(piece);
    if (piece.from != nullptr) work.reads.push_back({piece.from, piece.count * size_of(conversion.from_type)});
    work.writes.push_back({piece.to, piece.count * size_of(conversion.to_type)});
  }
  if (full.empty()) return {};
  if (const std::string text = find_overlap(work.reads, work.writes); !text.empty()) {
    violation_locked("in one conversion, " + text);
  }
  work.run = [conversion, full = std::move(full)] {
    for (const DevicePiece& piece : full) convert_piece(conversion, piece);
  };
  return enqueue_locked(stream, [work = std::move(work)] { return std::make_shared<FakeWork>(work); });
}

Status FakeDevice::launch(DeviceStream stream, FakeWork work) {
  const Lock lock(fake_mutex());
  return enqueue_locked(stream, [work = std::move(work)] { return std::make_shared<FakeWork>(work); });
}

Status FakeDevice::enqueue_locked(DeviceStream stream, const FakeLaunch& launch) {
  const Result<FakeStream*> found = stream_locked(stream);
  if (!found) return found.status();
  FakeStream& on = *found.value();
  if (on.capture) {
    on.capture->entries.push_back({on.lane, launch, {}, {}});
  } else {
    push_work_locked(on, launch);
  }
  return {};
}

void FakeDevice::push_work_locked(FakeStream& stream, const FakeLaunch& launch) {
  const std::shared_ptr<FakeWork> work = launch();
  if (!work) return;
  work->device = this;
  work->reads = without_empty(work->reads);
  work->writes = without_empty(work->writes);
  for (const ByteRange& range : work->reads) work->blocks.push_back(checker_.find(range));
  for (const ByteRange& range : work->writes) work->blocks.push_back(checker_.find(range));
  stream.queue.push_back({work, {}, {}, host_clock_});
  ++counts_.launches;
  fake_changed_locked();
}

bool FakeDevice::is_live_locked(const FakeWork& work) const {
  auto block = work.blocks.begin();
  const auto is_same = [&](const ByteRange& range) {
    const AccessChecker::BlockId id = *block++;
    return id != 0 && id == checker_.find(range);
  };
  return std::ranges::all_of(work.reads, is_same) && std::ranges::all_of(work.writes, is_same);
}

int FakeDevice::number_locked(DeviceStream stream) { return static_cast<FakeStream*>(stream)->device; }

FakeDevice* FakeDevice::find_locked(DeviceStream stream) {
  const auto found = process().devices.find(stream);
  return found == process().devices.end() ? nullptr : found->second;
}

}  // namespace hvd::testing
