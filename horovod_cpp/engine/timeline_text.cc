#include "horovod_cpp/engine/timeline_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace hvd::timeline {
namespace {

std::string upper(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(),
                 [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
  return result;
}

// "shared memory" -> "SHARED_MEMORY"
std::string word(std::string_view text) {
  std::string result = upper(text);
  std::replace_if(result.begin(), result.end(), [](char c) { return c == ' ' || c == '-'; }, '_');
  return result;
}

// How many bytes the character at the front has; 0 when it is none in UTF-8.
std::size_t character_bytes(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(0);
  const std::size_t bytes = first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (first > 0xf4) return 0;
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  const bool too_long = (first == 0xe0 && byte(1) < 0xa0) || (first == 0xf0 && byte(1) < 0x90);
  const bool surrogate = first == 0xed && byte(1) >= 0xa0;
  const bool too_large = first == 0xf4 && byte(1) >= 0x90;
  return too_long || surrogate || too_large ? 0 : bytes;
}

// All unnamed operations of a kind share a lane; otherwise each would have one for itself.
std::string lane_name(const OperationKey& key) {
  std::string name(name_of(key.op));
  if (key.op != OpKind::kJoin) name += is_generated_name(key.name) ? ".noname" : "." + key.name;
  if (key.process_set != 0) name += fmt::format(" (process set {})", key.process_set);
  return name;
}

std::string arguments_of(const Operand& operand) {
  std::string text;
  if (is_generated_name(operand.key.name)) text += fmt::format("\"name\": {}, ", json_string(operand.key.name));
  switch (operand.key.op) {
    case OpKind::kBarrier:
    case OpKind::kJoin:
      break;
    case OpKind::kProcessSetAdd:
      text += fmt::format(R"("ranks": "{}", )", shape_text(operand.shape));
      break;
    case OpKind::kProcessSetRemove:
      text += fmt::format(R"("process_set": "{}", )", shape_text(operand.shape));
      break;
    default:
      text += fmt::format(R"("dtype": "{}", "shape": "{}", "bytes": {}, )", name_of(operand.dtype),
                          shape_text(operand.shape), operand.bytes);
      if (operand.tensors > 1) text += fmt::format("\"tensors\": {}, ", operand.tensors);
  }
  if (!text.empty()) text.resize(text.size() - 2);
  return text;
}

}  // namespace

std::string json_string(std::string_view text) {
  std::string result = "\"";
  while (!text.empty()) {
    const std::size_t bytes = character_bytes(text);
    const char c = text.front();
    if (bytes == 0) {
      result += '?';
    } else if (c == '"' || c == '\\') {
      result += {'\\', c};
    } else if (bytes == 1 && static_cast<unsigned char>(c) < 0x20) {
      result += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      result += text.substr(0, bytes);
    }
    text.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return result + '"';
}

Text::Text(const Origin& origin) : origin_(origin) {
  event(fmt::format(R"("name": "process_name", "ph": "M", "pid": 0, "args": {{"name": "rank {} of {}", )"
                    R"("start_time_since_epoch_in_micros": {}, "rank": {}, "size": {}}})",
                    origin.rank, origin.size, origin.micros_since_epoch, origin.rank, origin.size));
  event(R"("name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0})");
}

std::string Text::take() { return std::exchange(text_, {}); }

void Text::add(const Record& record) {
  std::visit([&](const auto& fact) { write(record.time, fact); }, record.what);
}

void Text::add_lost(std::size_t records, TimePoint when) {
  event(fmt::format(R"("ph": "i", "name": "{} RECORDS LOST", "ts": {}, "pid": 0, "tid": 0, "s": "g")", records,
                    micros(when)));
}

// ---- facts ----------------------------------------------------------------------------------------------------------

void Text::write(TimePoint time, const Enqueued& fact) { negotiated(time, fact.key); }

void Text::write(TimePoint time, const RankReady& fact) {
  const Operation& operation = negotiated(time, fact.key);
  event(fmt::format(R"("ph": "X", "name": "{}", "ts": {}, "dur": 0, "pid": {}, "tid": {})", fact.rank, micros(time),
                    operation.lane, operation.row));
}

void Text::write(TimePoint time, const Agreed& fact) {
  begin_agreed(time, negotiated(time, fact.operand.key), fact.operand);
}

void Text::write(TimePoint time, const CallAgreed& fact) {
  Call call;
  call.transports = fact.transports;
  for (const Operand& operand : fact.operands) {
    const auto found = negotiating_.find(operand.key);
    Operation operation = found != negotiating_.end() ? found->second : place(operand.key);
    if (found != negotiating_.end()) negotiating_.erase(found);
    if (!operation.agreed) begin_agreed(time, operation, operand);
    call.operations.push_back(std::move(operation));
    call.bytes += operand.bytes;
  }
  calls_[fact.call] = std::move(call);
}

void Text::write(TimePoint time, const CallStarted& fact) {
  const auto found = calls_.find(fact.call);
  if (found == calls_.end()) return;
  for (Operation& operation : found->second.operations) end(time, operation);
}

void Text::write(TimePoint time, const ActivityBegun& fact) {
  const auto found = calls_.find(fact.call);
  if (found == calls_.end()) return;
  Call& call = found->second;
  std::string name = fact.kind == ActivityKind::kPack ? "MEMCPY_IN_FUSION_BUFFER" : "MEMCPY_OUT_FUSION_BUFFER";
  std::string arguments;
  if (fact.kind == ActivityKind::kCommunicate && !call.operations.empty()) {
    name = fmt::format("{}_{}", call.transports.empty() ? "LOCAL" : word(call.transports),
                       upper(name_of(call.operations.front().key.op)));
    arguments = fmt::format(R"("algorithm": "{}", "operations": {}, "bytes": {})", fact.algorithm,
                            call.operations.size(), call.bytes);
  }
  for (Operation& operation : call.operations) begin(time, operation, name, arguments);
}

void Text::write(TimePoint time, const ActivityEnded& fact) {
  const auto found = calls_.find(fact.call);
  if (found == calls_.end()) return;
  for (Operation& operation : found->second.operations) end(time, operation);
}

void Text::write(TimePoint time, const CallFinished& fact) {
  const auto found = calls_.find(fact.call);
  if (found == calls_.end()) return;
  for (Operation& operation : found->second.operations) finish(time, operation, fact.error);
  calls_.erase(found);
}

void Text::write(TimePoint time, const OperationEnded& fact) {
  const auto found = negotiating_.find(fact.key);
  if (found == negotiating_.end()) return;
  finish(time, found->second, fact.error);
  negotiating_.erase(found);
}

void Text::write(TimePoint time, const CycleStarted& /*fact*/) {
  event(fmt::format(R"("ph": "i", "name": "CYCLE_START", "ts": {}, "pid": 0, "tid": 0, "s": "g")", micros(time)));
}

// ---- operations -----------------------------------------------------------------------------------------------------

Text::Operation Text::place(const OperationKey& key) {
  const auto [found, is_new] = lanes_.try_emplace(lane_name(key));
  Lane& lane = found->second;
  if (is_new) {
    lane.number = static_cast<int>(lanes_.size());
    name_lane(lane.number, found->first);
  }
  const auto free = std::find(lane.taken.begin(), lane.taken.end(), false);
  const auto row = static_cast<std::size_t>(free - lane.taken.begin());
  if (free == lane.taken.end()) lane.taken.push_back(false);
  lane.taken[row] = true;
  Operation placed;
  placed.key = key;
  placed.lane = lane.number;
  placed.row = row;
  return placed;
}

// The operation while it is negotiated; the first that is heard of it begins that.
Text::Operation& Text::negotiated(TimePoint time, const OperationKey& key) {
  auto found = negotiating_.find(key);
  if (found == negotiating_.end()) {
    found = negotiating_.emplace(key, place(key)).first;
    begin(time, found->second, "NEGOTIATE_" + upper(name_of(key.op)));
  }
  return found->second;
}

void Text::begin_agreed(TimePoint time, Operation& operation, const Operand& operand) {
  while (operation.open > 0) end(time, operation);
  begin(time, operation, upper(name_of(operand.key.op)), arguments_of(operand));
  begin(time, operation, "QUEUE");
  operation.agreed = true;
}

void Text::begin(TimePoint time, Operation& operation, std::string_view name, std::string_view arguments) {
  ++operation.open;
  std::string fields = fmt::format(R"("ph": "B", "name": "{}", "ts": {}, "pid": {}, "tid": {})", name, micros(time),
                                   operation.lane, operation.row);
  if (!arguments.empty()) fields += fmt::format(R"(, "args": {{{}}})", arguments);
  event(fields);
}

void Text::end(TimePoint time, Operation& operation, std::string_view arguments) {
  if (operation.open == 0) return;
  --operation.open;
  std::string fields =
      fmt::format(R"("ph": "E", "ts": {}, "pid": {}, "tid": {})", micros(time), operation.lane, operation.row);
  if (!arguments.empty()) fields += fmt::format(R"(, "args": {{{}}})", arguments);
  event(fields);
}

void Text::finish(TimePoint time, Operation& operation, std::string_view error) {
  while (operation.open > 1) end(time, operation);
  end(time, operation, error.empty() ? std::string() : fmt::format("\"error\": {}", json_string(error)));
  lanes_[lane_name(operation.key)].taken[operation.row] = false;
}

// ---- text -----------------------------------------------------------------------------------------------------------

void Text::name_lane(int number, std::string_view name) {
  event(fmt::format(R"("name": "process_name", "ph": "M", "pid": {}, "args": {{"name": {}}})", number,
                    json_string(name)));
  event(fmt::format(R"("name": "process_sort_index", "ph": "M", "pid": {}, "args": {{"sort_index": {}}})", number,
                    number));
}

void Text::event(std::string_view fields) {
  if (!text_.empty()) text_ += ",\n";
  fmt::format_to(std::back_inserter(text_), "{{{}}}", fields);
}

// What was enqueued before the timeline was started begins with it.
std::string Text::micros(TimePoint time) const {
  const std::int64_t nanos = std::max<std::int64_t>((time - origin_.start).count(), 0);
  return fmt::format("{}.{:03}", nanos / 1000, nanos % 1000);
}

}  // namespace hvd::timeline
