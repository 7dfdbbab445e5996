// One call of a rank to the fake NCCL: what it touches, what its ranks have to agree on, and what they get.
// Pure functions of their arguments; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "ops/nccl/nccl_api.h"
#include "tests/support/access_checker.h"

namespace hvd::testing::fake_nccl {

using nccl::ElementType;
using nccl::RedOp;
using NcclResult = nccl::Result;  // hvd::Result is a template

enum class CallKind : std::uint8_t { kAllReduce, kAllGather, kReduceScatter, kBroadcast, kReduce, kSend, kReceive };

inline constexpr std::array kCallNames{"all_reduce", "all_gather", "reduce_scatter", "broadcast",
                                       "reduce",     "send",       "receive"};
inline constexpr std::array kTypeNames{"int8",   "uint8",   "int32",   "uint32",  "int64",
                                       "uint64", "float16", "float32", "float64", "bfloat16"};
inline constexpr std::array<std::size_t, 10> kTypeBytes{1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
inline constexpr std::array kOpNames{"sum", "prod", "max", "min", "avg"};

struct Call {
  CallKind kind = CallKind::kAllReduce;
  const void* send = nullptr;
  void* receive = nullptr;
  std::size_t count = 0;
  ElementType type = nccl::kFloat32;
  RedOp op = nccl::kSum;
  int peer = 0;  ///< or the root

  bool is_pair() const { return kind == CallKind::kSend || kind == CallKind::kReceive; }
  bool reduces() const {
    return kind == CallKind::kAllReduce || kind == CallKind::kReduceScatter || kind == CallKind::kReduce;
  }
  std::size_t bytes() const { return count * kTypeBytes[type]; }
};

/// What all ranks have to agree on, for people.
std::string signature(const Call& call);
/// Whether type, operation and peer are such as NCCL, and this library's reductions, have.
bool is_valid(const Call& call, int size);

struct CallRanges {
  ByteRange read;
  ByteRange write;
};
CallRanges ranges_of(const Call& call, int rank, int size);
/// Input and output are one place, one is the rank's part of the other, or they have nothing in common.
bool is_in_place_or_apart(const Call& call, int rank, int size);

/// Does what the calls of all ranks ask for: by rank, or a send and its receive.
void take_place(std::span<const Call> calls);

}  // namespace hvd::testing::fake_nccl
