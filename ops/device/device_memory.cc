#include "ops/device/device_memory.h"

#include <algorithm>
#include <bit>
#include <optional>

namespace hvd {
namespace {

constexpr std::size_t kSmallest = 512;

// An idle block may be so many times as large as what is asked for: where sizes differ from step to step, as those of
// allgathers do, each would else leave memory behind that no other one takes.
constexpr std::size_t kMostSlack = 2;

// Up to one eighth more, so that sizes that are nearly alike share blocks.
std::size_t size_class(std::size_t bytes) {
  const std::size_t step = std::max(kSmallest, std::bit_floor(std::max<std::size_t>(bytes, 1)) / 8);
  return std::max<std::size_t>(1, (bytes + step - 1) / step) * step;
}

}  // namespace

DeviceMemory::~DeviceMemory() {
  shelves_->idle.with([](Idle& idle) { idle.closed = true; });
  give_to_device(*shelves_);
}

void DeviceMemory::leave_to_process() {
  shelves_->idle.with([](Idle& idle) { idle.left = true; });
}

Result<std::shared_ptr<DeviceBlock>> DeviceMemory::lease(int device, std::size_t bytes, DeviceStream stream) {
  const std::size_t size = size_class(bytes);
  look_at_parked(*shelves_);
  std::optional<DeviceBlock> found = shelves_->idle.with([&](Idle& idle) -> std::optional<DeviceBlock> {
    const auto place = idle.blocks.lower_bound({device, size});
    if (place == idle.blocks.end() || place->first.first != device) return std::nullopt;
    if (place->first.second > kMostSlack * size) return std::nullopt;
    DeviceBlock block = std::move(place->second);
    idle.blocks.erase(place);
    return block;
  });
  if (!found) return lease_fresh(device, bytes);
  for (const DeviceMarkRef& mark : std::exchange(found->last_uses, {})) {
    // Left alone for good then: whoever had it may not be done with it.
    HVD_RETURN_IF_ERROR(shelves_->runtime.wait(device, stream, mark->event));
  }
  return hand_out(shelves_, std::move(*found));
}

Result<std::shared_ptr<DeviceBlock>> DeviceMemory::lease_fresh(int device, std::size_t bytes) {
  const std::size_t size = size_class(bytes);
  Result<void*> memory = shelves_->runtime.allocate(device, size);
  if (!memory) {  // what lies idle in other sizes may make room
    give_to_device(*shelves_);
    memory = shelves_->runtime.allocate(device, size);
  }
  if (!memory) return memory.status();
  DeviceBlock block;
  block.memory = static_cast<std::byte*>(*memory);
  block.bytes = size;
  block.device = device;
  return hand_out(shelves_, std::move(block));
}

std::shared_ptr<DeviceBlock> DeviceMemory::adopt(int device, void* memory, std::size_t bytes,
                                                 std::function<void(void*)> free) {
  auto block = std::make_unique<DeviceBlock>();
  block->memory = static_cast<std::byte*>(memory);
  block->bytes = bytes;
  block->device = device;
  return {block.release(), [shelves = shelves_, free = std::move(free)](DeviceBlock* done) {
            if (!shelves->idle.with([](const Idle& idle) { return idle.left; })) free(done->memory);
            delete done;
          }};
}

Result<std::shared_ptr<std::byte>> DeviceMemory::lease_pinned(std::size_t bytes) {
  std::size_t size = size_class(bytes);
  std::byte* place = shelves_->idle.with([&](Idle& idle) -> std::byte* {
    const auto found = idle.pinned.lower_bound(size);
    if (found == idle.pinned.end() || found->first > kMostSlack * size) return nullptr;
    std::byte* const memory = found->second;
    size = found->first;
    idle.pinned.erase(found);
    return memory;
  });
  if (place == nullptr) {
    Result<void*> memory = shelves_->runtime.allocate_pinned(size);
    if (!memory) return memory.status();
    place = static_cast<std::byte*>(*memory);
  }
  return std::shared_ptr<std::byte>(place, [shelves = shelves_, size](std::byte* done) {
    const bool kept = shelves->idle.with([&](Idle& idle) {
      if (!idle.closed) idle.pinned.emplace(size, done);
      return !idle.closed || idle.left;
    });
    if (!kept) shelves->runtime.free_pinned(done);
  });
}

std::shared_ptr<DeviceBlock> DeviceMemory::hand_out(const std::shared_ptr<Shelves>& shelves, DeviceBlock block) {
  return {new DeviceBlock(std::move(block)), [shelves](DeviceBlock* done) {
            take_back(*shelves, std::move(*done));
            delete done;
          }};
}

Result<bool> DeviceMemory::mark_consumers(Shelves& shelves, DeviceBlock& block) {
  for (DeviceStream stream : block.consumers) {
    Result<bool> capturing = shelves.runtime.is_capturing(block.device, stream);
    if (is_closed_by_capture(capturing)) return false;
    if (!capturing) return capturing;
  }
  DeviceEvents own(shelves.runtime);  // no pool: this is rare beside the work on a block
  for (DeviceStream stream : std::exchange(block.consumers, {})) {
    Result<DeviceMarkRef> mark = own.mark(block.device, stream);
    if (!mark) return mark.status();
    block.last_uses.push_back(std::move(mark).value());
  }
  return true;
}

// What the consumers have been given to do with it may not be done yet.
void DeviceMemory::take_back(Shelves& shelves, DeviceBlock block) {
  const Result<bool> marked = mark_consumers(shelves, block);
  const bool kept = marked.ok() && shelves.idle.with([&](Idle& idle) {
    if (idle.closed) return idle.left;
    if (marked.value()) {
      idle.blocks.emplace(std::pair(block.device, block.bytes), block);
    } else {
      idle.parked.push_back(block);
    }
    return true;
  });
  if (!kept) shelves.runtime.free(block.device, block.memory);  // waits for the device where that is necessary
}

void DeviceMemory::look_at_parked(Shelves& shelves) {
  std::vector<DeviceBlock> parked = shelves.idle.with([](Idle& idle) { return std::exchange(idle.parked, {}); });
  for (DeviceBlock& block : parked) take_back(shelves, std::move(block));
}

void DeviceMemory::give_to_device(Shelves& shelves) {
  const Idle idle = shelves.idle.with([](Idle& all) {
    Idle taken;
    taken.blocks = std::exchange(all.blocks, {});
    taken.pinned = std::exchange(all.pinned, {});
    taken.parked = std::exchange(all.parked, {});
    taken.left = all.left;
    return taken;
  });
  if (idle.left) return;
  for (const DeviceBlock& block : idle.parked) shelves.runtime.free(block.device, block.memory);
  for (const auto& [key, block] : idle.blocks) shelves.runtime.free(block.device, block.memory);
  for (const auto& [size, memory] : idle.pinned) shelves.runtime.free_pinned(memory);
}

}  // namespace hvd
