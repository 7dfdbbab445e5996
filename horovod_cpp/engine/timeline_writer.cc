#include "horovod_cpp/engine/timeline_writer.h"

#include <pthread.h>

#include <chrono>
#include <csignal>
#include <exception>

#include "common/log.h"

namespace hvd::timeline {
namespace {

// How old a record gets before it is in the file. Whoever records wakes nobody: the writer looks by itself.
constexpr auto kPeriod = std::chrono::milliseconds(50);

// About 30 MB; the writer takes hundreds of thousands of records a second.
constexpr std::size_t kMostRecords = std::size_t{1} << 18;

// A limit on the size of files is then an error of the write, not the end of the process.
void block_file_size_signal() {
  sigset_t blocked;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGXFSZ);
  ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
}

}  // namespace

void RecordQueue::open() {
  state_.with([](State& state) {
    state.batch = {};
    state.open = true;
  });
  open_.store(true, std::memory_order_relaxed);
}

void RecordQueue::close() {
  open_.store(false, std::memory_order_relaxed);
  state_.with([](State& state) { state.open = false; });
}

void RecordQueue::push(Record record) {
  state_.with([&](State& state) {
    if (!state.open) return;
    if (state.batch.records.size() < kMostRecords) {
      state.batch.records.push_back(std::move(record));
    } else {
      ++state.batch.lost;
    }
  });
}

void RecordQueue::swap(Batch& batch) {
  batch.records.clear();
  batch.lost = 0;
  state_.with([&](State& state) { std::swap(state.batch, batch); });
}

Writer::Writer(RecordQueue& queue, File file, const Origin& origin)
    : queue_(queue), file_(std::move(file)), text_(origin), path_(file_.path()) {
  thread_ = std::jthread([this](const std::stop_token& stop) { run(stop); });
  ::pthread_setname_np(thread_.native_handle(), "hvd-timeline");
}

Writer::~Writer() = default;

void Writer::run(const std::stop_token& stop) {
  block_file_size_signal();
  try {
    while (!stop.stop_requested()) {
      write_batch();
      std::unique_lock lock(sleeping_);
      condition_.wait_for(lock, stop, kPeriod, [] { return false; });
    }
    write_batch();
  } catch (const std::exception& error) {
    queue_.close();
    log::error("the timeline in '{}' ends here: {}", path_, error.what());
  }
}

void Writer::write_batch() {
  queue_.swap(batch_);
  if (failed_) return;
  for (const Record& record : batch_.records) text_.add(record);
  if (batch_.lost > 0 && !batch_.records.empty()) text_.add_lost(batch_.lost, batch_.records.back().time);
  const std::string events = text_.take();
  if (events.empty()) return;
  if (const Status written = file_.append(events); !written.ok()) {
    failed_ = true;
    queue_.close();
    log::error("{}; it ends here", written.text());
  }
}

}  // namespace hvd::timeline
