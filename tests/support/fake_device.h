// An accelerator on host memory: streams whose work runs later and in any legal order, and a check that the code under
// test orders all work on shared bytes. Takes graph capture and faults as well.
// Any thread; all fakes of a process share one mutex, because collectives touch the memory of several devices at once.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "ops/device/device_runtime.h"
#include "tests/support/access_checker.h"

namespace hvd::testing {

class FakeDevice;
struct FakeStream;
struct FakeEvent;
struct FakeEventPoint;
struct FakeCapture;

/// One kernel or copy. Its functions run under the fakes' mutex: they must not call a fake.
struct FakeWork {
  std::string name;
  // Initialised, so that a test may name a few only.
  std::vector<ByteRange> reads = {};
  std::vector<ByteRange> writes = {};
  std::function<void()> run = {};     ///< not called when memory that it touches is gone; may be empty
  std::function<bool()> ready = {};   ///< asked, again and again, while the work is the first of its stream; empty: yes
  std::function<void()> finish = {};  ///< called at the end even where `run` was not; may be empty

  // The device fills these in.
  FakeDevice* device = nullptr;
  std::vector<AccessChecker::BlockId> blocks = {};  ///< of reads, then writes, as they were when it was enqueued
};
/// Makes the work at the moment it is enqueued: once, or at every replay of a graph.
using FakeLaunch = std::function<std::shared_ptr<FakeWork>()>;
using FakeGraphRef = std::shared_ptr<FakeCapture>;

/// Calls that a test can let fail.
enum class FakeCall : std::uint8_t {
  kCreateStream,
  kCreateEvent,
  kRecord,
  kWait,
  kQuery,
  kAllocate,
  kAllocatePinned,
  kCopy,
  kConvert
};

class FakeDevice : public DeviceRuntime {
 public:
  struct Settings {
    std::uint64_t seed = 1;
    int devices = 1;
  };
  struct Counts {
    std::size_t launches = 0;             ///< copies, conversions, collectives and kernels of the test, as enqueued
    std::size_t synchronising_calls = 0;  ///< free and free_pinned of memory
    std::size_t allocations = 0;          ///< which may wait, too: allocate and allocate_pinned
    std::size_t events = 0;               ///< alive, as are the following
    std::size_t streams = 0;
    std::size_t bytes = 0;
    std::size_t pinned_bytes = 0;
    std::size_t pending = 0;  ///< entries of all queues: work, records and waits that have not run
  };

  FakeDevice() : FakeDevice(Settings{}) {}
  explicit FakeDevice(Settings settings);
  /// Each violation that the test did not take becomes a failure of the test.
  ~FakeDevice() override;
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;

  std::string description() const override { return "fake device on host memory"; }
  int device_count() const override { return settings_.devices; }
  Result<int> exchange_current(int device) override;
  Result<DeviceStream> create_stream(int device) override;
  void destroy_stream(int device, DeviceStream stream) override;
  Result<bool> is_capturing(int device, DeviceStream stream) override;
  Result<DeviceEvent> create_event(int device) override;
  void destroy_event(int device, DeviceEvent event) override;
  Status record(int device, DeviceEvent event, DeviceStream stream) override;
  Status wait(int device, DeviceStream stream, DeviceEvent event) override;
  Result<bool> query(int device, DeviceEvent event) override;
  Result<void*> allocate(int device, std::size_t bytes) override;
  void free(int device, void* memory) override;
  Result<void*> allocate_pinned(std::size_t bytes) override;
  void free_pinned(void* memory) override;
  /// The first device for memory that it knows: nothing here says whose it is.
  Result<int> device_of(const void* memory) override;
  Status copy(int device, void* to, const void* from, std::size_t bytes, DeviceStream stream) override;
  Status convert(int device, const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                 DeviceStream stream) override;

  // What a framework does beside us.

  /// Memory of the test becomes device memory, until forget. Forgetting it does not wait, as a caching allocator's
  /// free.
  void adopt(const void* memory, std::size_t bytes);
  void forget(const void* memory);
  /// A kernel of the test: `name`, `reads`, `writes` and `run` are asked for.
  Status launch(DeviceStream stream, FakeWork work);
  /// `blocking`: the stream is of those that wait for the default stream, which is closed then until the end.
  Status begin_capture(DeviceStream stream, bool blocking = false);
  /// The graph, or an error where the capture became invalid or a stream that took part was not joined.
  Result<FakeGraphRef> end_capture(DeviceStream stream);
  Status replay(const FakeGraphRef& graph, DeviceStream stream);

  // Time.

  /// Runs up to `heads` first entries of queues, drawn among those that may run, and returns how many ran.
  std::size_t advance(std::size_t heads);
  /// Until nothing may run. What waits for another device (a collective), or hangs, stays; see Counts::pending.
  std::size_t run_until_idle();
  /// The host waits for all work: what it enqueues afterwards is ordered after it. run_until_idle alone orders nothing.
  void synchronise();
  /// From here a thread advances the device.
  void start();
  void stop();

  // Faults.

  /// Of the calls of this kind from now on, the first `after` succeed and the next `times` return `status`.
  void fail(FakeCall call, Status status, std::size_t after = 0,
            std::size_t times = std::numeric_limits<std::size_t>::max());
  void fail_allocation(std::size_t number) {  ///< from now on; the first is 1
    fail(FakeCall::kAllocate, Status::internal("out of memory"), number - 1, 1);
  }
  void clear_faults();
  bool has_faults_left() const;  ///< calls that are still to fail
  void hang();                   ///< no entry of a queue runs from now on
  void release();                ///< ends hang

  // What was seen.

  Counts counts() const;
  std::vector<std::string> violations() const;
  std::vector<std::string> take_violations();
  /// Names of all work that ran, each with the number of its stream: "2: convert". Default streams have the first
  /// numbers.
  std::vector<std::string> history() const;

  // For the other fakes: the caller holds fake_mutex().

  /// The device of a stream, or nullptr.
  static FakeDevice* find_locked(DeviceStream stream);
  static int number_locked(DeviceStream stream);  ///< of a stream that find_locked finds
  Status enqueue_locked(DeviceStream stream, const FakeLaunch& launch);
  /// Whether all memory of the work is still what it was when the work was enqueued.
  bool is_live_locked(const FakeWork& work) const;

 private:
  struct Fault {
    FakeCall call;
    Status status;
    std::size_t after;
    std::size_t times;
  };

  Status fault_locked(FakeCall call);
  Result<FakeStream*> stream_locked(int device, DeviceStream stream);
  Result<FakeStream*> stream_locked(DeviceStream stream);
  bool is_closed_locked(const FakeStream& stream) const;
  Result<FakeEvent*> event_locked(int device, DeviceEvent event);
  FakeStream* add_stream_locked(int device);
  Result<void*> allocate_locked(FakeCall call, std::size_t bytes, std::size_t& alive);
  void free_locked(void* memory, std::size_t& alive);
  void push_work_locked(FakeStream& stream, const FakeLaunch& launch);
  bool may_run_locked(const FakeStream& stream) const;
  bool advance_one_locked();
  void run_head_locked(FakeStream& stream);
  void run_work_locked(FakeStream& stream, FakeWork& work);
  void violation_locked(std::string text) { violations_.push_back(std::move(text)); }

  const Settings settings_;
  std::mt19937_64 random_;
  std::vector<std::string> violations_;
  AccessChecker checker_{violations_};
  // Default streams come first. Neither list shrinks, so no handle is given out twice.
  std::vector<std::unique_ptr<FakeStream>> streams_;
  std::vector<std::unique_ptr<FakeEvent>> events_;
  std::set<void*> allocated_;
  std::vector<Fault> faults_;
  bool hangs_ = false;
  Counts counts_;
  VectorClock host_clock_;
  std::vector<std::string> history_;
  std::jthread thread_;  ///< last: it uses all of the above
};

/// Advances all devices in turn until none can go on: collectives meet.
void run_until_idle(std::span<FakeDevice* const> devices);

/// What exchange_current left in this thread.
struct FakeCurrent {
  FakeDevice* owner = nullptr;  ///< nullptr: the thread has used no device
  int device = -1;
};
FakeCurrent& fake_current();

/// Guards the state of all fakes of the process.
std::mutex& fake_mutex();
/// Something happened that may let work run. The caller holds fake_mutex().
void fake_changed_locked();
/// Until something has happened that makes `condition` true; false after 60 s without.
bool fake_wait_locked(std::unique_lock<std::mutex>& lock, const std::function<bool()>& condition);

}  // namespace hvd::testing
