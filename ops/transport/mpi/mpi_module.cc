// The module libhvd_mpi.so: the only code that is compiled against <mpi.h>, a table of thin functions over MPI.
// Called by one thread at a time, as mpi_api.h says.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/transport/mpi/mpi_api.h"

namespace hvd {
namespace {

static_assert(sizeof(MPI_Request) <= sizeof(MpiRequest));

MPI_Comm communicator = MPI_COMM_NULL;  // ours; there is one for the life of the process, as there is one MPI

MPI_Request load(const MpiRequest& request) {
  MPI_Request value;
  std::memcpy(&value, &request, sizeof value);
  return value;
}

void store(MpiRequest* request, MPI_Request value) { std::memcpy(request, &value, sizeof value); }

bool fits_int(std::size_t bytes) { return bytes <= static_cast<std::size_t>(std::numeric_limits<int>::max()); }

int initialized(int* flag) { return MPI_Initialized(flag); }
int finalized(int* flag) { return MPI_Finalized(flag); }

int library_version(char* text, std::size_t capacity) {
  char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  const int error = MPI_Get_library_version(version, &length);
  std::snprintf(text, capacity, "%s", version);
  return error;
}

void error_text(int error, char* text, std::size_t capacity) {
  char message[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  if (MPI_Error_string(error, message, &length) != MPI_SUCCESS) {
    std::snprintf(message, sizeof message, "MPI error %d", error);
  }
  std::snprintf(text, capacity, "%s", message);
}

int init() {
  int provided = MPI_THREAD_SINGLE;
  return MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
}

int thread_level(int* level) {
  int provided = MPI_THREAD_SINGLE;
  const int error = MPI_Query_thread(&provided);
  *level = kMpiThreadsNone;
  if (provided == MPI_THREAD_SERIALIZED) *level = kMpiThreadsSerialized;
  if (provided == MPI_THREAD_MULTIPLE) *level = kMpiThreadsMultiple;
  return error;
}

int rank_and_size(int* rank, int* size) {
  const int error = MPI_Comm_rank(MPI_COMM_WORLD, rank);
  return error == MPI_SUCCESS ? MPI_Comm_size(MPI_COMM_WORLD, size) : error;
}

int duplicate(MpiRequest* request) {
  MPI_Request value = MPI_REQUEST_NULL;
  const int error = MPI_Comm_idup(MPI_COMM_WORLD, &communicator, &value);
  store(request, value);
  return error;
}

int adopt_communicator(int* largest_tag) {
  const int error = MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN);
  if (error != MPI_SUCCESS) return error;
  void* value = nullptr;
  int found = 0;
  // Asked of MPI_COMM_WORLD: some libraries set the attribute there only.
  const int asked = MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &value, &found);
  constexpr int kGuaranteed = 32767;
  *largest_tag = asked == MPI_SUCCESS && found != 0 ? *static_cast<int*>(value) : kGuaranteed;
  return asked;
}

int finalize() { return MPI_Finalize(); }

int send(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request) {
  if (!fits_int(bytes)) return MPI_ERR_COUNT;
  MPI_Request value = MPI_REQUEST_NULL;
  const int error = MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, communicator, &value);
  store(request, value);
  return error;
}

int send_matched(const void* data, std::size_t bytes, int peer, int tag, MpiRequest* request) {
  if (!fits_int(bytes)) return MPI_ERR_COUNT;
  MPI_Request value = MPI_REQUEST_NULL;
  const int error = MPI_Issend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, communicator, &value);
  store(request, value);
  return error;
}

int receive(void* place, std::size_t bytes, int peer, int tag, MpiRequest* request) {
  if (!fits_int(bytes)) return MPI_ERR_COUNT;
  MPI_Request value = MPI_REQUEST_NULL;
  const int source = peer == kMpiAnySource ? MPI_ANY_SOURCE : peer;
  const int error = MPI_Irecv(place, static_cast<int>(bytes), MPI_BYTE, source, tag, communicator, &value);
  store(request, value);
  return error;
}

int broadcast(void* data, std::size_t bytes, int root, MpiRequest* request) {
  if (!fits_int(bytes)) return MPI_ERR_COUNT;
  MPI_Request value = MPI_REQUEST_NULL;
  const int error = MPI_Ibcast(data, static_cast<int>(bytes), MPI_BYTE, root, communicator, &value);
  store(request, value);
  return error;
}

int barrier(MpiRequest* request) {
  MPI_Request value = MPI_REQUEST_NULL;
  const int error = MPI_Ibarrier(communicator, &value);
  store(request, value);
  return error;
}

int cancel(MpiRequest* request) {
  MPI_Request value = load(*request);
  const int error = MPI_Cancel(&value);
  store(request, value);
  return error;
}

MpiOutcome outcome_of(int index, const MPI_Status& status, int error) {
  MpiOutcome outcome{};
  outcome.index = index;
  outcome.error = error;
  outcome.source = status.MPI_SOURCE;
  MPI_Test_cancelled(&status, &outcome.cancelled);
  int bytes = 0;
  if (error == MPI_SUCCESS && outcome.cancelled == 0) MPI_Get_count(&status, MPI_BYTE, &bytes);
  outcome.bytes = bytes > 0 ? static_cast<std::uint64_t>(bytes) : 0;
  return outcome;
}

int test_one(MpiRequest* request, MpiOutcome* outcome, int* finished) {
  MPI_Request value = load(*request);
  *finished = 0;
  if (value == MPI_REQUEST_NULL) return MPI_SUCCESS;
  MPI_Status status;
  int flag = 0;
  const int error = MPI_Test(&value, &flag, &status);
  store(request, value);
  *finished = flag != 0 || error != MPI_SUCCESS ? 1 : 0;
  if (*finished == 1) *outcome = outcome_of(0, status, error);
  return MPI_SUCCESS;
}

// Kept between calls, since a test must not allocate. One thread at a time.
struct Scratch {
  std::vector<MPI_Request> requests;
  std::vector<int> indices;
  std::vector<MPI_Status> statuses;
};

int test(MpiRequest* requests, int count, MpiOutcome* outcomes, int* finished) {
  *finished = 0;
  if (count == 0) return MPI_SUCCESS;
  if (count == 1) return test_one(requests, outcomes, finished);
  static Scratch scratch;
  scratch.requests.resize(static_cast<std::size_t>(count));
  scratch.indices.resize(static_cast<std::size_t>(count));
  scratch.statuses.resize(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) scratch.requests[static_cast<std::size_t>(i)] = load(requests[i]);
  int done = 0;
  const int error =
      MPI_Testsome(count, scratch.requests.data(), &done, scratch.indices.data(), scratch.statuses.data());
  if (error != MPI_SUCCESS && error != MPI_ERR_IN_STATUS) return error;
  if (done == MPI_UNDEFINED) return MPI_SUCCESS;
  for (int i = 0; i < done; ++i) {
    const int index = scratch.indices[static_cast<std::size_t>(i)];
    const MPI_Status& status = scratch.statuses[static_cast<std::size_t>(i)];
    store(&requests[index], scratch.requests[static_cast<std::size_t>(index)]);
    outcomes[i] = outcome_of(index, status, error == MPI_ERR_IN_STATUS ? status.MPI_ERROR : MPI_SUCCESS);
  }
  *finished = done;
  return MPI_SUCCESS;
}

const MpiApi api{
    .struct_bytes = sizeof(MpiApi),
    .abi_version = kMpiAbiVersion,
    .initialized = initialized,
    .finalized = finalized,
    .library_version = library_version,
    .error_text = error_text,
    .init = init,
    .thread_level = thread_level,
    .rank_and_size = rank_and_size,
    .duplicate = duplicate,
    .adopt_communicator = adopt_communicator,
    .finalize = finalize,
    .send = send,
    .send_matched = send_matched,
    .receive = receive,
    .broadcast = broadcast,
    .barrier = barrier,
    .cancel = cancel,
    .test = test,
};

}  // namespace
}  // namespace hvd

extern "C" __attribute__((visibility("default"))) const hvd::MpiApi* hvd_mpi_api() { return &hvd::api; }
