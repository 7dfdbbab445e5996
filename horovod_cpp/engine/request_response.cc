#include "horovod_cpp/engine/request_response.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "common/wire.h"

namespace hvd {
namespace {

constexpr std::array<std::string_view, 9> kOpNames{"allreduce",     "allgather",       "broadcast",
                                                   "barrier",       "add_process_set", "remove_process_set",
                                                   "reducescatter", "alltoall",        "join"};
constexpr std::string_view kGeneratedPrefix = "noname.";

WireWriter begin(MessageKind kind) {
  WireWriter out;
  out.fixed(kind);
  return out;
}

void put(WireWriter& out, const OperationKey& key) {
  out.varint(key.process_set);
  out.fixed(key.op);
  out.text(key.name);
}

OperationKey get_key(WireReader& in) {
  OperationKey key;
  key.process_set = in.number<ProcessSetId>();
  key.op = in.fixed<OpKind>();
  key.name = in.text();
  return key;
}

// A data type is one byte, of which the highest bit says that pairs of numbers are complex ones.
constexpr std::uint8_t kComplexBit = 0x80;
constexpr std::uint8_t kAsCacheId = 0x01;

void put_dtype(WireWriter& out, DataType dtype, bool is_complex) {
  const auto number = static_cast<std::uint8_t>(dtype);
  out.fixed(static_cast<std::uint8_t>(is_complex ? number | kComplexBit : number));
}

DataType get_dtype(WireReader& in, bool& is_complex) {
  const auto byte = in.fixed<std::uint8_t>();
  is_complex = (byte & kComplexBit) != 0;
  return static_cast<DataType>(byte & ~kComplexBit);
}

void put(WireWriter& out, const std::vector<TensorType>& tensors) {
  out.varint(tensors.size());
  for (const TensorType& tensor : tensors) {
    put_dtype(out, tensor.dtype, tensor.is_complex);
    out.integers(tensor.shape);
    out.varint(tensor.order);
  }
}

std::vector<TensorType> get_tensors(WireReader& in) {
  std::vector<TensorType> tensors(in.count(3));
  for (TensorType& tensor : tensors) {
    tensor.dtype = get_dtype(in, tensor.is_complex);
    tensor.shape = in.integers();
    tensor.order = in.varint();
  }
  return tensors;
}

void put(WireWriter& out, const Request& request) {
  put(out, request.key);
  put_dtype(out, request.dtype, request.is_complex);
  out.fixed(request.reduce_op);
  out.fixed(request.prescale);
  out.fixed(request.postscale);
  out.fixed(request.root_rank);
  out.integers(request.shape);
  out.varint(request.order);
  put(out, request.more);
  out.fixed(request.memory);
  out.fixed(request.device);
  out.varint(request.region);
  out.varint(request.offset);
  out.varint(request.call_site);
}

Request get_request(WireReader& in) {
  Request request;
  request.key = get_key(in);
  request.dtype = get_dtype(in, request.is_complex);
  request.reduce_op = in.fixed<ReduceOp>();
  request.prescale = in.fixed<double>();
  request.postscale = in.fixed<double>();
  request.root_rank = in.fixed<std::int32_t>();
  request.shape = in.integers();
  request.order = in.varint();
  request.more = get_tensors(in);
  request.memory = in.fixed<MemoryKind>();
  request.device = in.fixed<std::int32_t>();
  request.region = in.number<std::uint32_t>();
  request.offset = in.varint();
  request.call_site = in.number<std::uint32_t>();
  return request;
}

void put(WireWriter& out, const ResponseEntry& entry, bool as_cache_id) {
  out.fixed(static_cast<std::uint8_t>((as_cache_id ? kAsCacheId : 0) | (entry.is_complex ? kComplexBit : 0)));
  out.varint(entry.cache_id);
  if (as_cache_id) return;
  out.text(entry.name);
  out.integers(entry.shape);
  out.integers(entry.first_dims);
  put(out, entry.more);
  out.varint(entry.order);
  out.integers(entry.devices);
}

ResponseEntry get_entry(WireReader& in, bool& as_cache_id) {
  ResponseEntry entry;
  const auto bits = in.fixed<std::uint8_t>();
  as_cache_id = (bits & kAsCacheId) != 0;
  entry.is_complex = (bits & kComplexBit) != 0;
  entry.cache_id = in.number<CacheId>();
  if (as_cache_id) return entry;
  entry.name = in.text();
  entry.shape = in.integers();
  entry.first_dims = in.integers();
  entry.more = get_tensors(in);
  entry.order = in.varint();
  entry.devices = in.integers();
  return entry;
}

void put_head(WireWriter& out, const Response& response) {
  out.fixed(response.kind);
  out.fixed(response.op);
  out.varint(response.process_set);
  out.fixed(response.dtype);
  out.fixed(response.reduce_op);
  out.fixed(response.prescale);
  out.fixed(response.postscale);
  out.fixed(response.root_rank);
  out.fixed(response.memory);
  out.varint(response.call);
  out.varint(response.new_process_set);
  out.varint(response.standing);
  out.fixed(response.error_code);
  out.text(response.error);
}

Response get_head(WireReader& in) {
  Response response;
  response.kind = in.fixed<Response::Kind>();
  response.op = in.fixed<OpKind>();
  response.process_set = in.number<ProcessSetId>();
  response.dtype = in.fixed<DataType>();
  response.reduce_op = in.fixed<ReduceOp>();
  response.prescale = in.fixed<double>();
  response.postscale = in.fixed<double>();
  response.root_rank = in.fixed<std::int32_t>();
  response.memory = in.fixed<MemoryKind>();
  response.call = in.varint();
  response.new_process_set = in.number<ProcessSetId>();
  response.standing = in.number<StandingNumber>();
  response.error_code = in.fixed<StatusCode>();
  response.error = in.text();
  return response;
}

void put(WireWriter& out, const std::vector<StandingUse>& uses) {
  out.varint(uses.size());
  for (const StandingUse& one : uses) {
    out.varint(one.number);
    out.varint(one.use);
  }
}

std::vector<StandingUse> get_uses(WireReader& in) {
  std::vector<StandingUse> uses(in.count(2));
  for (StandingUse& one : uses) {
    one.number = in.number<StandingNumber>();
    one.use = in.number<std::uint32_t>();
  }
  return uses;
}

bool is_known(OpKind op) { return static_cast<std::size_t>(op) < kOpNames.size(); }

// Reads the kind byte, then the rest with `get`; what is left over or missing is an error.
template <typename Message, typename Get>
Result<Message> decode(std::span<const std::byte> bytes, MessageKind kind, Get get) {
  WireReader in(bytes);
  Message message;
  const bool is_this_kind = in.fixed<MessageKind>() == kind;
  if (is_this_kind) get(in, message);
  if (!is_this_kind || !in.ok() || !in.at_end()) {
    return Status::internal(
        fmt::format("a control message of kind {} with {} bytes cannot be read", static_cast<int>(kind), bytes.size()));
  }
  return message;
}

}  // namespace

std::string_view name_of(OpKind op) { return is_known(op) ? kOpNames[static_cast<std::size_t>(op)] : "unknown"; }

std::string_view name_of(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kHost:
      return "host";
    case MemoryKind::kDevice:
      return "CUDA device";
    case MemoryKind::kDeviceCaptured:
      return "CUDA device, under graph capture";
  }
  return "unknown";
}

std::string operation_text(const OperationKey& key) {
  return key.name.empty() ? fmt::format("an unnamed {}", name_of(key.op))
                          : fmt::format("{} '{}'", name_of(key.op), key.name);
}

std::string generated_name(std::uint64_t n, std::uint64_t epoch) {
  return epoch == 0 ? fmt::format("{}{}", kGeneratedPrefix, n) : fmt::format("{}{}.{}", kGeneratedPrefix, epoch, n);
}

bool is_generated_name(std::string_view name) { return name.starts_with(kGeneratedPrefix); }

std::string shape_text(std::span<const std::int64_t> shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

Result<std::int64_t> element_count(std::span<const std::int64_t> shape) {
  constexpr std::int64_t most = std::int64_t{1} << 59;  // so that bytes can be counted as well
  std::int64_t count = 1;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) return Status::invalid_argument(fmt::format("shape {} has a negative dimension", shape_text(shape)));
    if (size == 0) empty = true;
    if (size > 0 && count > most / size) {
      return Status::invalid_argument(fmt::format("shape {} has too many elements", shape_text(shape)));
    }
    if (size > 0) count *= size;
  }
  return empty ? 0 : count;
}

std::size_t bytes_of(DataType dtype, const Shape& shape) {
  const Result<std::int64_t> count = element_count(shape);
  return count.ok() ? static_cast<std::size_t>(count.value()) * size_of(dtype) : 0;
}

TensorType type_of(const Request& request, std::size_t index) {
  if (index > 0) return request.more[index - 1];
  return {request.dtype, request.shape, request.order, request.is_complex};
}

std::vector<TensorType> tensors_of(const Request& request) {
  std::vector<TensorType> tensors{type_of(request, 0)};
  tensors.insert(tensors.end(), request.more.begin(), request.more.end());
  return tensors;
}

std::vector<std::byte> encode(const RequestsMessage& message) {
  WireWriter out = begin(MessageKind::kRequests);
  out.varint(message.call_sites.size());
  for (const CallSiteDefinition& site : message.call_sites) {
    out.varint(site.id);
    out.text(site.text);
  }
  out.varint(message.requests.size());
  for (const Request& request : message.requests) put(out, request);
  out.varint(message.cached.size());
  for (const CacheId id : message.cached) out.varint(id);
  out.varint(message.forgotten);
  put(out, message.asked);
  put(out, message.ended);
  put(out, message.overdue);
  return out.take();
}

Result<RequestsMessage> decode_requests(std::span<const std::byte> bytes) {
  return decode<RequestsMessage>(bytes, MessageKind::kRequests, [](WireReader& in, RequestsMessage& message) {
    message.call_sites.resize(in.count(2));
    for (CallSiteDefinition& site : message.call_sites) {
      site.id = in.number<std::uint32_t>();
      site.text = in.text();
    }
    const std::size_t requests = in.count(32);
    for (std::size_t i = 0; i < requests && in.ok(); ++i) message.requests.push_back(get_request(in));
    message.cached.resize(in.count(1));
    for (CacheId& id : message.cached) id = in.number<CacheId>();
    message.forgotten = in.number<std::uint32_t>();
    message.asked = get_uses(in);
    message.ended = get_uses(in);
    message.overdue = get_uses(in);
  });
}

std::vector<std::byte> encode(const ResponsesMessage& message) {
  WireWriter out = begin(MessageKind::kResponses);
  out.varint(message.evicted.size());
  for (const CacheId id : message.evicted) out.varint(id);
  out.varint(message.responses.size());
  std::size_t place = 0;
  for (const Response& response : message.responses) {
    put_head(out, response);
    out.varint(response.entries.size());
    for (const ResponseEntry& entry : response.entries) put(out, entry, message.as_cache_id[place++]);
  }
  put(out, message.ended);
  put(out, message.overdue);
  return out.take();
}

Result<ResponsesMessage> decode_responses(std::span<const std::byte> bytes) {
  return decode<ResponsesMessage>(bytes, MessageKind::kResponses, [](WireReader& in, ResponsesMessage& message) {
    message.evicted.resize(in.count(1));
    for (CacheId& id : message.evicted) id = in.number<CacheId>();
    const std::size_t responses = in.count(21);
    for (std::size_t i = 0; i < responses && in.ok(); ++i) {
      Response response = get_head(in);
      const std::size_t entries = in.count(2);
      for (std::size_t k = 0; k < entries && in.ok(); ++k) {
        bool as_cache_id = false;
        response.entries.push_back(get_entry(in, as_cache_id));
        message.as_cache_id.push_back(as_cache_id);
      }
      message.responses.push_back(std::move(response));
    }
    message.ended = get_uses(in);
    message.overdue = get_uses(in);
  });
}

std::vector<std::byte> encode(const PeerLostMessage& message) {
  WireWriter out = begin(MessageKind::kPeerLost);
  out.fixed(message.rank);
  out.text(message.text);
  return out.take();
}

Result<PeerLostMessage> decode_peer_lost(std::span<const std::byte> bytes) {
  return decode<PeerLostMessage>(bytes, MessageKind::kPeerLost, [](WireReader& in, PeerLostMessage& message) {
    message.rank = in.fixed<std::int32_t>();
    message.text = in.text();
  });
}

std::vector<std::byte> encode(const CallFailedMessage& message) {
  WireWriter out = begin(MessageKind::kCallFailed);
  out.varint(message.process_set);
  out.varint(message.call);
  out.text(message.text);
  return out.take();
}

Result<CallFailedMessage> decode_call_failed(std::span<const std::byte> bytes) {
  return decode<CallFailedMessage>(bytes, MessageKind::kCallFailed, [](WireReader& in, CallFailedMessage& message) {
    message.process_set = in.number<ProcessSetId>();
    message.call = in.varint();
    message.text = in.text();
  });
}

std::vector<std::byte> encode(const StallQueryMessage& message) {
  WireWriter out = begin(MessageKind::kStallQuery);
  out.varint(message.keys.size());
  for (const OperationKey& key : message.keys) put(out, key);
  return out.take();
}

Result<StallQueryMessage> decode_stall_query(std::span<const std::byte> bytes) {
  return decode<StallQueryMessage>(bytes, MessageKind::kStallQuery, [](WireReader& in, StallQueryMessage& message) {
    const std::size_t keys = in.count(3);
    for (std::size_t i = 0; i < keys && in.ok(); ++i) message.keys.push_back(get_key(in));
  });
}

std::vector<std::byte> encode(const StallReportMessage& message) {
  WireWriter out = begin(MessageKind::kStallReport);
  out.varint(message.lines.size());
  for (const StallReportMessage::Line& line : message.lines) {
    put(out, line.key);
    out.integers(line.missing);
    out.text(line.hint);
  }
  return out.take();
}

Result<StallReportMessage> decode_stall_report(std::span<const std::byte> bytes) {
  return decode<StallReportMessage>(bytes, MessageKind::kStallReport, [](WireReader& in, StallReportMessage& message) {
    const std::size_t lines = in.count(5);
    for (std::size_t i = 0; i < lines && in.ok(); ++i) {
      StallReportMessage::Line line;
      line.key = get_key(in);
      line.missing = in.integers();
      line.hint = in.text();
      message.lines.push_back(std::move(line));
    }
  });
}

std::vector<std::byte> encode_shutdown() { return begin(MessageKind::kShutdown).take(); }

Result<MessageKind> message_kind(std::span<const std::byte> message) {
  WireReader in(message);
  const auto kind = in.fixed<MessageKind>();
  if (!in.ok() || kind < MessageKind::kRequests || kind > MessageKind::kStallReport) {
    return Status::internal(fmt::format("a control message of {} bytes has no known kind", message.size()));
  }
  return kind;
}

}  // namespace hvd
