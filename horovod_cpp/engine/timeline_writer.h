// The thread that writes a timeline: it owns the file, and takes records from a queue that any thread fills.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "common/guarded.h"
#include "horovod_cpp/engine/timeline_file.h"
#include "horovod_cpp/engine/timeline_text.h"

namespace hvd::timeline {

/// Records on their way to the writer. While it is closed, records are dropped. Any thread.
class RecordQueue {
 public:
  /// Relaxed: whoever is late by one record loses or keeps that one; the lock of `push` decides.
  bool is_open() const { return open_.load(std::memory_order_relaxed); }
  /// Empty from now on, and open.
  void open();
  void close();
  /// One short lock. A record too many (the disk does not keep up) is counted in place of being kept.
  void push(Record record);

  struct Batch {
    std::vector<Record> records;
    std::size_t lost = 0;
  };
  /// What was pushed since the last time; `batch` gives its memory for what comes next.
  void swap(Batch& batch);

 private:
  struct State {
    Batch batch;
    bool open = false;
  };
  std::atomic<bool> open_{false};
  Guarded<State> state_;
};

class Writer {
 public:
  /// Starts the thread, which writes to `file` what comes to `queue`. Closes the queue, with one line in the log, if
  /// the file takes no more.
  Writer(RecordQueue& queue, File file, const Origin& origin);
  /// Writes what the queue holds and ends. Close the queue before.
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  const std::string& path() const { return path_; }

 private:
  void run(const std::stop_token& stop);
  void write_batch();

  RecordQueue& queue_;
  File file_;
  Text text_;
  const std::string path_;
  RecordQueue::Batch batch_;
  bool failed_ = false;
  std::mutex sleeping_;
  std::condition_variable_any condition_;
  std::jthread thread_;
};

}  // namespace hvd::timeline
