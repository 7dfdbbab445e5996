// NCCL over FakeDevice: communicators whose ranks are threads of this process, each with a device of its own. Calls
// never block; a collective is one piece of work per rank, which runs once those of all its ranks are first in their
// streams. Any thread, also those of several ranks at once; at most one FakeNccl exists at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ops/nccl/nccl_api.h"

namespace hvd::testing {

/// What goes wrong, on all communicators and ranks unless these are named.
struct FakeNcclFault {
  enum class Kind : std::uint8_t {
    kInitRefused,      ///< comm_init_rank_config itself returns kSystemError
    kInitFails,        ///< the initialisation ends with kSystemError
    kInitHangs,        ///< it stays kInProgress until the communicator is aborted
    kLaunchHangs,      ///< so does call number `call`, which never gets to its stream
    kCollectiveHangs,  ///< call number `call` and later ones never end on their stream until the abort
    kRegisterFails,    ///< comm_register returns kSystemError
    kAsyncError,       ///< from call number `call` on, the asynchronous error is kRemoteError and calls never end
  };
  static constexpr int kAny = -1;

  Kind kind = Kind::kInitFails;
  int group = kAny;                    ///< which get_unique_id made it; the first is 0
  int rank = kAny;                     ///< in the communicator
  std::uint64_t call = 0;              ///< counted per rank of a communicator; the first is 0
  std::string text = "planted fault";  ///< what get_last_error says
};

class FakeNccl {
 public:
  struct Settings {
    std::uint64_t seed = 1;
    int version = 22703;
    int max_init_polls = 3;                 ///< comm_get_async_error says kInProgress so often, drawn from 0 to this
    int max_launch_polls = 3;               ///< the same after a launch and after comm_finalize
    bool every_launch_in_progress = false;  ///< otherwise only the first launch of a communicator
    std::chrono::milliseconds abort_takes{0};
    bool abort_waits = false;  ///< as NCCL's: until the communicator's work has left its streams, which have to run
  };

  FakeNccl() : FakeNccl(Settings{}) {}
  explicit FakeNccl(Settings settings);
  /// Each violation that the test did not take becomes a failure of the test.
  ~FakeNccl();
  FakeNccl(const FakeNccl&) = delete;
  FakeNccl& operator=(const FakeNccl&) = delete;

  /// The calls that this stands behind. Memory functions (mem_alloc, comm_register) are nullptr, as in NCCL 2.18.
  static nccl::Api api();
  /// With them. In a call where one rank uses memory of theirs all have to, registered, at one offset; memory has to be
  /// deregistered before it is freed and before its communicator is destroyed.
  static nccl::Api api_with_memory();

  void inject(FakeNcclFault fault);
  void clear_faults();

  std::size_t alive_communicators() const;
  std::size_t alive_memory() const;         ///< blocks of mem_alloc
  std::size_t alive_registrations() const;  ///< an abort ends those of its communicator
  /// Calls of all ranks that used registered memory, as enqueued; those of a graph at each replay.
  std::size_t registered_calls() const;
  /// Calls that began on a device while one of another communicator was under way there: they may take each other's
  /// room.
  std::size_t concurrent_calls() const;
  /// The threads that called comm_abort, in order.
  std::vector<std::thread::id> abort_threads() const;
  std::vector<std::string> violations() const;
  std::vector<std::string> take_violations();

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace hvd::testing
