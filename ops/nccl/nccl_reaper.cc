#include "ops/nccl/nccl_reaper.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common/log.h"
#include "ops/nccl/current_device.h"

namespace hvd {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);
constexpr auto kNap = std::chrono::milliseconds(1);

}  // namespace

struct NcclReaper::Ending {
  nccl::Comm comm = nullptr;
  int device = 0;
  bool gently = false;
  NcclRegistered registered;
};

struct NcclReaper::State {
  State(const nccl::Api& of, DeviceRuntime& on) : api(of), runtime(on) {}

  void end(const Ending& ending) const {
    const CurrentDevice current(runtime, ending.device);
    // While the communicator can still tell its helpers. An abort undoes registrations itself, once nothing uses them.
    if (ending.gently && ending.registered.block) api.comm_deregister(ending.comm, ending.registered.registration);
    if (ending.gently && finalise(ending.comm)) {
      api.comm_destroy(ending.comm);
    } else {
      api.comm_abort(ending.comm);
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

  /// What may be let go of. The caller has the mutex, and lets go without it.
  std::vector<std::shared_ptr<void>> take_released() {
    std::vector<std::shared_ptr<void>> released;
    while (!held.empty() && (under_way.empty() || *under_way.begin() >= held.front().first)) {
      released.push_back(std::move(held.front().second));
      held.pop_front();
    }
    return released;
  }

  const nccl::Api& api;  // both live as long as the process
  DeviceRuntime& runtime;
  std::mutex mutex;
  std::condition_variable changed;
  int threads = 0;
  std::uint64_t next = 0;
  std::set<std::uint64_t> under_way;                                 // endings, by number
  std::deque<std::pair<std::uint64_t, std::shared_ptr<void>>> held;  // until all endings below that number are done
};

NcclReaper::NcclReaper(const nccl::Api& api, DeviceRuntime& runtime) : state_(std::make_shared<State>(api, runtime)) {}

NcclReaper::~NcclReaper() {
  std::unique_lock lock(state_->mutex);
  state_->changed.wait_for(lock, kPatience, [this] { return state_->threads == 0; });
}

void NcclReaper::abort(nccl::Comm comm, int device, NcclRegistered registered) {
  begin({comm, device, /*gently=*/false, std::move(registered)});
}

void NcclReaper::finish(nccl::Comm comm, int device, NcclRegistered registered) {
  begin({comm, device, /*gently=*/true, std::move(registered)});
}

void NcclReaper::release_after(std::shared_ptr<void> held) {
  std::vector<std::shared_ptr<void>> released;
  const std::scoped_lock lock(state_->mutex);
  state_->held.emplace_back(state_->next, std::move(held));
  released = state_->take_released();
}

void NcclReaper::begin(Ending ending) {
  std::uint64_t number = 0;
  {
    const std::scoped_lock lock(state_->mutex);
    number = state_->next++;
    state_->under_way.insert(number);
    ++state_->threads;
  }
  const auto held = std::make_shared<Ending>(std::move(ending));
  try {
    // Detached: it ends by itself, and NCCL may keep it for longer than this process cares.
    std::thread([state = state_, number, held] {
      state->end(*held);
      held->registered = {};
      std::vector<std::shared_ptr<void>> released;
      {
        const std::scoped_lock lock(state->mutex);
        state->under_way.erase(number);
        released = state->take_released();
      }
      released.clear();
      const std::scoped_lock lock(state->mutex);
      --state->threads;
      state->changed.notify_all();
    }).detach();
  } catch (const std::system_error& error) {
    log::error("no thread to end a communicator of NCCL: {}", error.what());
    const std::scoped_lock lock(state_->mutex);
    --state_->threads;
    state_->held.emplace_back(number + 1, held);  // for good, as the communicator stays
  }
}

}  // namespace hvd
