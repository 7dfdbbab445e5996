// The C ABI between the library and the MPI module: all that we ask of MPI, without MPI's types.
// Every function but the queries of `initialized` and `finalized` is called by one thread at a time.
//
// Errors are MPI's error codes, 0 for success; `error_text` explains them. Constants of MPI never cross this border:
// implementations number them differently.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hvd {

inline constexpr std::uint32_t kMpiAbiVersion = 1;

/// Memory for one MPI_Request. All zero is not a valid request: it is filled by the function that starts one.
struct MpiRequest {
  std::uint64_t storage[1];
};

/// What a finished request says.
struct MpiOutcome {
  int index;            ///< which of the requests asked about
  int error;            ///< of this message
  int cancelled;        ///< 1: the cancellation came in time, nothing was received
  int source;           ///< receives only
  std::uint64_t bytes;  ///< received
};

enum MpiThreadLevel : int { kMpiThreadsNone = 0, kMpiThreadsSerialized = 1, kMpiThreadsMultiple = 2 };

inline constexpr int kMpiAnySource = -1;

/// Members are only ever added at the end; `struct_bytes` and `abi_version` say what a module has.
/// Counts are at most 2^31-1. Memory of a message belongs to MPI until its request is finished.
struct MpiApi {
  std::uint64_t struct_bytes;
  std::uint32_t abi_version;

  int (*initialized)(int* flag);
  int (*finalized)(int* flag);
  int (*library_version)(char* text, std::size_t capacity);
  void (*error_text)(int error, char* text, std::size_t capacity);

  // Start and end; init and finalize block until the other ranks do the same.
  int (*init)();
  int (*thread_level)(int* level);
  int (*rank_and_size)(int* rank, int* size);
  /// Starts to duplicate MPI_COMM_WORLD; once the request is finished, `adopt_communicator` makes ours usable.
  int (*duplicate)(MpiRequest* request);
  int (*adopt_communicator)(int* largest_tag);
  int (*finalize)();

  // On our communicator; none of them blocks.
  int (*send)(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request);
  /// Finishes only once the receiver has matched it.
  int (*send_matched)(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request);
  int (*receive)(void* place, std::size_t bytes, int peer, int tag, MpiRequest* request);
  int (*broadcast)(void* data, std::size_t bytes, int root, MpiRequest* request);
  int (*barrier)(MpiRequest* request);
  /// Asks MPI to give up a receive; it still has to be tested until it is finished.
  int (*cancel)(MpiRequest* request);
  /// Lets MPI work, and tells which of `count` requests are finished: `*finished` entries of `outcomes`, which has room
  /// for `count`. A finished request is not told again; its memory may be used for another one.
  int (*test)(MpiRequest* requests, int count, MpiOutcome* outcomes, int* finished);
};

/// What the module exports.
using MpiApiFunction = const MpiApi*();
inline constexpr const char* kMpiApiSymbol = "hvd_mpi_api";

}  // namespace hvd
