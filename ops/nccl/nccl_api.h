// NCCL as this library sees it: the few types of its ABI, and its calls as pointers that the loader finds in whichever
// NCCL the process has. So nothing here is compiled or linked against NCCL, and tests put functions of their own here.
// Numbers and layouts are those of nccl.h since 2.18; tests/ops/nccl/nccl_header_test.cc compares them where there is
// one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace hvd::nccl {

using Comm = void*;  ///< ncclComm_t

enum Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum ElementType : int {
  kInt8 = 0,
  kUint8 = 1,
  kInt32 = 2,
  kUint32 = 3,
  kInt64 = 4,
  kUint64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBfloat16 = 9,
};

enum RedOp : int { kSum = 0, kProd = 1, kMax = 2, kMin = 3, kAvg = 4 };

struct UniqueId {
  std::array<char, 128> bytes;
};

/// ncclConfig_t as 2.18 has it. The library reads what it knows of `size` bytes; INT_MIN and nullptr mean its default.
struct Config {
  static constexpr int kUndefined = static_cast<int>(0x80000000U);

  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21800;  ///< of the layout
  int blocking = kUndefined;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
};

/// Streams are cudaStream_t. Where a call is newer than 2.18 its pointer may be nullptr.
struct Api {
  Result (*get_version)(int* version) = nullptr;
  Result (*get_unique_id)(UniqueId* id) = nullptr;
  Result (*comm_init_rank_config)(Comm* comm, int ranks, UniqueId id, int rank, Config* config) = nullptr;
  Result (*comm_get_async_error)(Comm comm, Result* error) = nullptr;
  Result (*comm_finalize)(Comm comm) = nullptr;
  Result (*comm_destroy)(Comm comm) = nullptr;
  Result (*comm_abort)(Comm comm) = nullptr;
  const char* (*get_last_error)(Comm comm) = nullptr;
  const char* (*get_error_string)(Result result) = nullptr;
  Result (*group_start)() = nullptr;
  Result (*group_end)() = nullptr;
  Result (*all_reduce)(const void* send, void* receive, std::size_t count, ElementType type, RedOp op, Comm comm,
                       void* stream) = nullptr;
  Result (*all_gather)(const void* send, void* receive, std::size_t send_count, ElementType type, Comm comm,
                       void* stream) = nullptr;
  Result (*reduce_scatter)(const void* send, void* receive, std::size_t receive_count, ElementType type, RedOp op,
                           Comm comm, void* stream) = nullptr;
  Result (*broadcast)(const void* send, void* receive, std::size_t count, ElementType type, int root, Comm comm,
                      void* stream) = nullptr;
  Result (*reduce)(const void* send, void* receive, std::size_t count, ElementType type, RedOp op, int root, Comm comm,
                   void* stream) = nullptr;
  Result (*send)(const void* data, std::size_t count, ElementType type, int peer, Comm comm, void* stream) = nullptr;
  Result (*receive)(void* place, std::size_t count, ElementType type, int peer, Comm comm, void* stream) = nullptr;

  Result (*mem_alloc)(void** memory, std::size_t bytes) = nullptr;                                     ///< 2.19
  Result (*mem_free)(void* memory) = nullptr;                                                          ///< 2.19
  Result (*comm_register)(Comm comm, void* memory, std::size_t bytes, void** registration) = nullptr;  ///< 2.19
  Result (*comm_deregister)(Comm comm, void* registration) = nullptr;                                  ///< 2.19
};

/// For the table of features: a call that is not in every NCCL since 2.18, and whether this one has it.
struct Feature {
  const char* name;
  bool there;
};

}  // namespace hvd::nccl
