#include "ops/nccl/nccl_reaper.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace hvd {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);

}  // namespace

struct NcclReaper::State {
  explicit State(const nccl::Api& of) : api(of) {}

  const nccl::Api& api;  // lives as long as the process
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<nccl::Comm> waiting;
  bool works = false;  // the thread is there
};

NcclReaper::NcclReaper(const nccl::Api& api) : state_(std::make_shared<State>(api)) {}

NcclReaper::~NcclReaper() {
  std::unique_lock lock(state_->mutex);
  state_->changed.wait_for(lock, kPatience, [this] { return !state_->works; });
}

void NcclReaper::abort(nccl::Comm comm) {
  const std::scoped_lock lock(state_->mutex);
  state_->waiting.push_back(comm);
  if (std::exchange(state_->works, true)) return;
  // Detached: it ends by itself when nothing is left, and NCCL may keep it for longer than this process cares.
  std::thread([state = state_] {
    std::unique_lock turn(state->mutex);
    while (!state->waiting.empty()) {
      const nccl::Comm next = state->waiting.back();
      state->waiting.pop_back();
      turn.unlock();
      state->api.comm_abort(next);
      turn.lock();
    }
    state->works = false;
    state->changed.notify_all();
  }).detach();
}

}  // namespace hvd
