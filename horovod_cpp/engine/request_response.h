// What ranks tell each other: a request says "I have tensor X ready", a response says what all do now.
// Values and their bytes; any thread.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/reduce_op.h>
#include <horovod_cpp/status.h>

#include "ops/memory_order.h"

namespace hvd {

/// Those of the C ABI equal its hvd_op; the numbers are part of the wire format.
enum class OpKind : std::uint8_t {
  kAllreduce = 0,
  kAllgather = 1,
  kBroadcast = 2,
  kBarrier = 3,
  kProcessSetAdd = 4,
  kProcessSetRemove = 5,
  kReducescatter = 6,
  kAlltoall = 7,
  kJoin = 8,
};

/// Where tensors lie, and whether the call becomes part of a CUDA graph.
enum class MemoryKind : std::uint8_t { kHost = 0, kDevice = 1, kDeviceCaptured = 2 };
std::string_view name_of(MemoryKind kind);

using ProcessSetId = std::uint16_t;
using Shape = std::vector<std::int64_t>;

/// Names an operation while it is negotiated.
struct OperationKey {
  ProcessSetId process_set = 0;
  OpKind op = OpKind::kAllreduce;
  std::string name;
  auto operator<=>(const OperationKey&) const = default;
};

/// One of several tensors that are one operation.
struct TensorType {
  DataType dtype = DataType::kUint8;
  Shape shape;
  MemoryOrder order = kCOrder;  ///< as in Request and ResponseEntry
  bool is_complex = false;      ///< as in Request
  bool operator==(const TensorType&) const = default;
};

struct Request {
  OperationKey key;
  DataType dtype = DataType::kUint8;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
  std::int32_t root_rank = 0;        ///< broadcast: global rank
  Shape shape;                       ///< process set operations: the ranks of the set
  MemoryOrder order = kCOrder;       ///< in which the tensor lies in this rank's memory
  bool is_complex = false;           ///< the last dimension has the real and the imaginary parts of complex numbers
  std::vector<TensorType> more;      ///< a group: the tensors after the first
  std::vector<std::int64_t> splits;  ///< alltoall: rows for each rank of the set; stays on its own rank, like:
  bool has_splits = false;           ///< otherwise equal shares
  MemoryKind memory = MemoryKind::kHost;
  std::int32_t device = -1;     ///< of this rank, where the tensors lie on one
  std::uint32_t region = 0;     ///< memory that peers can name; 0: private memory
  std::uint64_t offset = 0;     ///< within the region
  std::uint32_t call_site = 0;  ///< interned "file:line"; 0: not known
};

/// Id of a remembered response; ids are never used twice in a job. 0: none.
using CacheId = std::uint32_t;

/// Number of a standing response; numbers are never used twice in a job. 0: none.
using StandingNumber = std::uint16_t;
/// Numbers go up to here, so that each has a channel of its own.
inline constexpr StandingNumber kMostStanding = 4095;

/// One use of a standing response: the first is use 0.
struct StandingUse {
  StandingNumber number = 0;
  std::uint32_t use = 0;
  bool operator==(const StandingUse&) const = default;
};

struct ResponseEntry {
  std::string name;
  Shape shape;                           ///< of every rank; allgather: of the first rank
  std::vector<std::int64_t> first_dims;  ///< allgather: rows of each rank of the set; a group: of each tensor in turn
  CacheId cache_id = 0;
  std::vector<TensorType> more;  ///< a group: the tensors after the first, as `shape`
  MemoryOrder order = kCOrder;   ///< in which the call takes the tensor: that of all ranks, C order where they differ
  bool is_complex = false;       ///< as in Request
  /// Of each rank of the set, where the tensors lie in device memory; otherwise none. -1: of a rank that has joined and
  /// never had one.
  std::vector<std::int64_t> devices = {};
};

struct Response {
  enum class Kind : std::uint8_t { kExecute, kError, kShutdown };

  Kind kind = Kind::kExecute;
  OpKind op = OpKind::kAllreduce;
  ProcessSetId process_set = 0;
  DataType dtype = DataType::kUint8;
  ReduceOp reduce_op = ReduceOp::kSum;
  double prescale = 1.0;
  double postscale = 1.0;
  std::int32_t root_rank = 0;  ///< join: the rank that joined last
  MemoryKind memory = MemoryKind::kHost;
  std::uint64_t call = 0;  ///< number of the call within its process set; names the channel
  ProcessSetId new_process_set = 0;
  StandingNumber standing = 0;  ///< not 0: from the next time on, the call is made without asking; see standing_calls.h
  std::vector<ResponseEntry> entries;
  StatusCode error_code = StatusCode::kOk;
  std::string error;

  Status status() const { return kind == Kind::kExecute ? Status() : Status(error_code, error); }
};

std::string_view name_of(OpKind op);
/// "allreduce 'x'", or "an unnamed allreduce".
std::string operation_text(const OperationKey& key);
/// The name of the n-th unnamed operation since the job's join number `epoch`, when all ranks began to count again.
/// It never comes again, so nothing is remembered under it.
std::string generated_name(std::uint64_t n, std::uint64_t epoch = 0);
bool is_generated_name(std::string_view name);
/// All joins of a job are one operation.
inline constexpr std::string_view kJoinName = "join";
std::string shape_text(std::span<const std::int64_t> shape);
/// Elements of a shape; kInvalidArgument for a negative dimension or a product beyond 2^59.
Result<std::int64_t> element_count(std::span<const std::int64_t> shape);
/// Bytes of a tensor whose shape has been checked.
std::size_t bytes_of(DataType dtype, const Shape& shape);
/// Calls visit(dtype, shape) for the tensor of a request or of an entry, or for each of the group, without a copy.
template <typename Visit>
void for_each_tensor(const Request& request, Visit visit) {
  visit(request.dtype, request.shape);
  for (const TensorType& tensor : request.more) visit(tensor.dtype, tensor.shape);
}
template <typename Visit>
void for_each_tensor(const Response& response, const ResponseEntry& entry, Visit visit) {
  visit(response.dtype, entry.shape);
  for (const TensorType& tensor : entry.more) visit(tensor.dtype, tensor.shape);
}
/// The order of tensor number `index` of a request or of an entry.
template <typename Tensors>
MemoryOrder order_of(const Tensors& tensors, std::size_t index) {
  return index == 0 ? tensors.order : tensors.more[index - 1].order;
}
/// Where rank `index` of the set has the tensors of an entry; -1: in host memory, or not known.
inline std::int32_t device_of(const ResponseEntry& entry, int index) {
  return entry.devices.empty() ? -1 : static_cast<std::int32_t>(entry.devices[static_cast<std::size_t>(index)]);
}
/// A copy of one of the tensors of a request.
TensorType type_of(const Request& request, std::size_t index);
/// Copies of the tensors of a request.
std::vector<TensorType> tensors_of(const Request& request);

// ---- control messages -----------------------------------------------------------------------------------------------

enum class MessageKind : std::uint8_t {
  kRequests = 1,     ///< worker -> coordinator
  kResponses = 2,    ///< coordinator -> worker
  kShutdown = 3,     ///< worker -> coordinator: this rank ends the job
  kPeerLost = 4,     ///< either way: a rank is gone
  kCallFailed = 5,   ///< either way: a call failed on a rank
  kStallQuery = 6,   ///< worker -> coordinator: who is missing?
  kStallReport = 7,  ///< coordinator -> worker
};

struct CallSiteDefinition {
  std::uint32_t id = 0;
  std::string text;
};

struct RequestsMessage {
  std::vector<CallSiteDefinition> call_sites;  ///< those that this message uses for the first time
  std::vector<Request> requests;
  std::vector<CacheId> cached;  ///< requests that equal a remembered response
  /// Ids sent earlier that were forgotten on the way: their requests are among these, or given up.
  std::uint32_t forgotten = 0;
  /// Which uses of responses that stood here some of these requests are: the ones under the keys of those.
  std::vector<StandingUse> asked;
  std::vector<StandingUse> ended;    ///< this rank begins this use no more, nor a later one
  std::vector<StandingUse> overdue;  ///< this rank has begun this use and waits for others

  bool is_empty() const {
    return call_sites.empty() && requests.empty() && cached.empty() && forgotten == 0 && asked.empty() &&
           ended.empty() && overdue.empty();
  }
};

struct ResponsesMessage {
  std::vector<CacheId> evicted;  ///< forgotten after the responses; a request sent as one of them is sent again whole
  std::vector<Response> responses;
  /// Parallel to the entries of all responses: true where the entry travels as its cache id alone.
  std::vector<bool> as_cache_id;
  /// What a member has said of its standing responses, before the responses above.
  std::vector<StandingUse> ended;
  std::vector<StandingUse> overdue;
};

struct PeerLostMessage {
  std::int32_t rank = -1;
  std::string text;
};

struct CallFailedMessage {
  ProcessSetId process_set = 0;
  std::uint64_t call = 0;
  std::string text;
};

struct StallQueryMessage {
  std::vector<OperationKey> keys;
};

struct StallReportMessage {
  struct Line {
    OperationKey key;
    std::vector<std::int64_t> missing;  ///< global ranks that have not asked for it
    std::string hint;                   ///< what they wait for instead, where that tells something
  };
  std::vector<Line> lines;
};

std::vector<std::byte> encode(const RequestsMessage& message);
std::vector<std::byte> encode(const ResponsesMessage& message);
std::vector<std::byte> encode(const PeerLostMessage& message);
std::vector<std::byte> encode(const CallFailedMessage& message);
std::vector<std::byte> encode(const StallQueryMessage& message);
std::vector<std::byte> encode(const StallReportMessage& message);
std::vector<std::byte> encode_shutdown();

/// kInternal for an empty message or an unknown kind.
Result<MessageKind> message_kind(std::span<const std::byte> message);

/// Each takes a whole message; kInternal when the bytes are not one. Allocates at most in proportion to the bytes.
Result<RequestsMessage> decode_requests(std::span<const std::byte> message);
Result<ResponsesMessage> decode_responses(std::span<const std::byte> message);
Result<PeerLostMessage> decode_peer_lost(std::span<const std::byte> message);
Result<CallFailedMessage> decode_call_failed(std::span<const std::byte> message);
Result<StallQueryMessage> decode_stall_query(std::span<const std::byte> message);
Result<StallReportMessage> decode_stall_report(std::span<const std::byte> message);

}  // namespace hvd
