// How time passes on a fake device, what goes wrong in it, and what was seen.
#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "tests/support/fake_device_parts.h"

namespace hvd::testing {

bool FakeDevice::may_run_locked(const FakeStream& stream) const {
  if (stream.queue.empty()) return false;
  const FakeEntry& head = stream.queue.front();
  if (head.wait) return head.wait->done;
  return !head.work || !head.work->ready || head.work->ready();
}

bool FakeDevice::advance_one_locked() {
  if (hangs_) return false;
  std::vector<FakeStream*> able;
  for (const auto& stream : streams_) {
    if (may_run_locked(*stream)) able.push_back(stream.get());
  }
  if (able.empty()) return false;
  run_head_locked(*able[random_() % able.size()]);
  fake_changed_locked();
  return true;
}

void FakeDevice::run_head_locked(FakeStream& stream) {
  const FakeEntry& head = stream.queue.front();
  join(stream.clock, head.host_clock);
  if (head.wait) join(stream.clock, head.wait->clock);
  if (head.record) {
    head.record->done = true;
    head.record->clock = stream.clock;
  }
  if (head.work) run_work_locked(stream, *head.work);
  stream.queue.pop_front();
}

void FakeDevice::run_work_locked(FakeStream& stream, FakeWork& work) {
  if (stream.clock.size() <= stream.index) stream.clock.resize(stream.index + 1);
  ++stream.clock[stream.index];
  history_.push_back(fmt::format("{}: {}", stream.index, work.name));
  if (is_live_locked(work)) {
    checker_.access(stream.index, stream.clock, work.name, work.reads, work.writes);
    if (work.run) work.run();
  } else {
    violation_locked(fmt::format("'{}' on stream {} touches memory that is not there", work.name, stream.index));
  }
  if (work.finish) work.finish();
}

std::size_t FakeDevice::advance(std::size_t heads) {
  const Lock lock(fake_mutex());
  std::size_t done = 0;
  while (done < heads && advance_one_locked()) ++done;
  return done;
}

std::size_t FakeDevice::run_until_idle() { return advance(std::numeric_limits<std::size_t>::max()); }

void FakeDevice::synchronise() {
  Lock lock(fake_mutex());
  const auto is_idle = [this] {
    return std::ranges::all_of(streams_, [](const auto& stream) { return stream->queue.empty(); });
  };
  while (!is_idle()) {
    if (advance_one_locked()) continue;
    const std::uint64_t seen = process().changes;
    const bool changed =
        process().changed.wait_for(lock, std::chrono::seconds(60), [seen] { return process().changes != seen; });
    if (!changed) return violation_locked("synchronise: nothing went on for 60 s");
  }
  for (const auto& stream : streams_) join(host_clock_, stream->clock);
}

void FakeDevice::start() {
  thread_ = std::jthread([this](const std::stop_token& stop) {
    Lock lock(fake_mutex());
    while (!stop.stop_requested()) {
      const std::uint64_t seen = process().changes;
      if (advance_one_locked()) {
        lock.unlock();
        std::this_thread::yield();  // one entry at a time, so that others come between
        lock.lock();
      } else {
        process().changed.wait(lock, stop, [seen] { return process().changes != seen; });
      }
    }
  });
}

void FakeDevice::stop() { thread_ = {}; }

void run_until_idle(std::span<FakeDevice* const> devices) {
  for (std::size_t idle = 0; idle < 2;) {  // the second round is for collectives whose last member came in the first
    std::size_t ran = 0;
    for (FakeDevice* device : devices) ran += device->advance(1);
    idle = ran == 0 ? idle + 1 : 0;
  }
}

// Faults, and what was seen.

Status FakeDevice::fault_locked(FakeCall call) {
  for (Fault& fault : faults_) {
    if (fault.call != call || fault.times == 0) continue;
    if (fault.after > 0) {
      --fault.after;
      continue;
    }
    --fault.times;
    return fault.status;
  }
  return {};
}

void FakeDevice::fail(FakeCall call, Status status, std::size_t after, std::size_t times) {
  const Lock lock(fake_mutex());
  faults_.push_back({call, std::move(status), after, times});
}

void FakeDevice::clear_faults() {
  const Lock lock(fake_mutex());
  faults_.clear();
}

bool FakeDevice::has_faults_left() const {
  const Lock lock(fake_mutex());
  return std::ranges::any_of(faults_, [](const Fault& fault) { return fault.times > 0; });
}

void FakeDevice::hang() {
  const Lock lock(fake_mutex());
  hangs_ = true;
}

void FakeDevice::release() {
  const Lock lock(fake_mutex());
  hangs_ = false;
  fake_changed_locked();
}

FakeDevice::Counts FakeDevice::counts() const {
  const Lock lock(fake_mutex());
  Counts counts = counts_;
  for (const auto& stream : streams_) counts.pending += stream->queue.size();
  return counts;
}

std::vector<std::string> FakeDevice::violations() const {
  const Lock lock(fake_mutex());
  return violations_;
}

std::vector<std::string> FakeDevice::take_violations() {
  const Lock lock(fake_mutex());
  return std::exchange(violations_, {});
}

std::vector<std::string> FakeDevice::history() const {
  const Lock lock(fake_mutex());
  return history_;
}

}  // namespace hvd::testing
