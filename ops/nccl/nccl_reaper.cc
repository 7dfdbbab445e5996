#include "ops/nccl/nccl_reaper.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "ops/nccl/current_device.h"

namespace hvd {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);
constexpr auto kNap = std::chrono::milliseconds(1);

}  // namespace

struct NcclReaper::Task {
  nccl::Comm comm = nullptr;
  int device = 0;
  bool gently = false;
  NcclRegistered registered;
  std::shared_ptr<void> held;
};

struct NcclReaper::State {
  State(const nccl::Api& of, DeviceRuntime& on) : api(of), runtime(on) {}

  void end(const Task& task) const {
    if (task.comm == nullptr) return;
    const CurrentDevice current(runtime, task.device);
    // While the communicator can still tell its helpers. An abort undoes registrations itself, once nothing uses them.
    if (task.gently && task.registered.block) api.comm_deregister(task.comm, task.registered.registration);
    if (task.gently && finalise(task.comm)) {
      api.comm_destroy(task.comm);
    } else {
      api.comm_abort(task.comm);
    }
  }

  bool finalise(nccl::Comm comm) const {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    nccl::Result state = api.comm_finalize(comm);
    while (state == nccl::kInProgress && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(kNap);
      if (api.comm_get_async_error(comm, &state) != nccl::kSuccess) return false;
    }
    return state == nccl::kSuccess;
  }

  const nccl::Api& api;  // both live as long as the process
  DeviceRuntime& runtime;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Task> waiting;
  bool works = false;  // the thread is there
};

NcclReaper::NcclReaper(const nccl::Api& api, DeviceRuntime& runtime) : state_(std::make_shared<State>(api, runtime)) {}

NcclReaper::~NcclReaper() {
  std::unique_lock lock(state_->mutex);
  state_->changed.wait_for(lock, kPatience, [this] { return !state_->works; });
}

void NcclReaper::abort(nccl::Comm comm, int device, NcclRegistered registered) {
  add({comm, device, /*gently=*/false, std::move(registered), nullptr});
}

void NcclReaper::finish(nccl::Comm comm, int device, NcclRegistered registered) {
  add({comm, device, /*gently=*/true, std::move(registered), nullptr});
}

void NcclReaper::release_after(std::shared_ptr<void> held) { add({nullptr, 0, false, {}, std::move(held)}); }

void NcclReaper::add(Task task) {
  const std::scoped_lock lock(state_->mutex);
  state_->waiting.push_back(std::move(task));
  if (std::exchange(state_->works, true)) return;
  // Detached: it ends by itself when nothing is left, and NCCL may keep it for longer than this process cares.
  std::thread([state = state_] {
    std::unique_lock turn(state->mutex);
    while (!state->waiting.empty()) {
      Task next = std::move(state->waiting.front());
      state->waiting.pop_front();
      turn.unlock();
      state->end(next);
      next.registered = {};
      next.held.reset();
      turn.lock();
    }
    state->works = false;
    state->changed.notify_all();
  }).detach();
}

}  // namespace hvd
