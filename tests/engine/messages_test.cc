// Control messages: what is written is read, and whatever else arrives is refused without harm.

#include <gtest/gtest.h>

#include <random>

#include "horovod_cpp/engine/request_response.h"
#include "tests/support/random_seed.h"

namespace hvd::testing {
namespace {

Request some_request(const std::string& name) {
  Request request;
  request.key = {300, OpKind::kBroadcast, name};
  request.dtype = DataType::kBfloat16;
  request.reduce_op = ReduceOp::kMax;
  request.prescale = 0.25;
  request.postscale = -3.0;
  request.root_rank = -2;
  request.shape = {0, 1, std::int64_t{1} << 40};
  request.order = 0xffff'ffff'ffff'ffff;
  request.is_complex = true;
  request.more = {{DataType::kBool, {2, 3}, 1}, {DataType::kFloat16, {2}, kCOrder, true}};
  request.memory = MemoryKind::kDeviceCaptured;
  request.device = 3;
  request.region = 77;
  request.offset = std::uint64_t{1} << 50;
  request.call_site = 123;
  return request;
}

RequestsMessage some_requests() {
  RequestsMessage message;
  message.call_sites = {{1, "train.py:1"}, {2, ""}};
  message.requests = {some_request("a"), some_request("")};
  message.cached = {1, 500, 0xffff'ffff};
  message.forgotten = 300;
  message.asked = {{1, 7}, {kMostStanding, 0}};
  message.ended = {{kMostStanding, 0xffff'ffff}};
  message.overdue = {{2, 300}, {3, 0}, {4, 1}};
  return message;
}

ResponsesMessage some_responses() {
  ResponsesMessage message;
  message.evicted = {5, 600};
  Response execute;
  execute.op = OpKind::kAllgather;
  execute.process_set = 9;
  execute.dtype = DataType::kFloat64;
  execute.reduce_op = ReduceOp::kProduct;
  execute.prescale = 2;
  execute.postscale = 3;
  execute.root_rank = 4;
  execute.call = std::uint64_t{1} << 33;
  execute.new_process_set = 12;
  execute.standing = 700;
  execute.entries = {{"a", {1, 2}, {3, 4, 5}, 6, {{DataType::kInt8, {7}, 2}}, 0x110, true, {-1, 0, 7}},
                     {"b", {}, {}, 0, {}}};
  Response error;
  error.kind = Response::Kind::kError;
  error.error_code = StatusCode::kUnavailable;
  error.error = "a text";
  message.responses = {execute, error};
  message.as_cache_id = {false, false};
  message.ended = {{700, 1 << 27}};
  message.overdue = {{1, 2}, {3, 4}};
  return message;
}

// Filled field by field: g++ 12 warns of nested braces that are not uninitialised.
StallQueryMessage some_query() {
  StallQueryMessage query;
  query.keys.resize(2);
  query.keys[0] = {0, OpKind::kBarrier, "b"};
  query.keys[1] = {5, OpKind::kAllreduce, "x"};
  return query;
}

StallReportMessage some_report() {
  StallReportMessage report;
  report.lines.resize(1);
  report.lines[0].key = {5, OpKind::kAllreduce, "x"};
  report.lines[0].missing = {1, 2, 300};
  report.lines[0].hint = "a hint";
  return report;
}

TEST(Messages, RequestsComeBackAsTheyWere) {
  const RequestsMessage message = some_requests();
  const Result<RequestsMessage> back = decode_requests(encode(message));
  ASSERT_TRUE(back.ok()) << back.status().text();
  ASSERT_EQ(back.value().requests.size(), 2u);
  const Request& request = back.value().requests[0];
  const Request wanted = some_request("a");
  EXPECT_EQ(request.key, wanted.key);
  EXPECT_EQ(request.dtype, wanted.dtype);
  EXPECT_EQ(request.reduce_op, wanted.reduce_op);
  EXPECT_EQ(request.prescale, wanted.prescale);
  EXPECT_EQ(request.postscale, wanted.postscale);
  EXPECT_EQ(request.root_rank, wanted.root_rank);
  EXPECT_EQ(request.shape, wanted.shape);
  EXPECT_EQ(request.order, wanted.order);
  EXPECT_EQ(request.is_complex, wanted.is_complex);
  EXPECT_EQ(request.more, wanted.more);
  EXPECT_FALSE(request.more.empty());
  EXPECT_EQ(request.memory, wanted.memory);
  EXPECT_EQ(request.device, wanted.device);
  EXPECT_EQ(request.region, wanted.region);
  EXPECT_EQ(request.offset, wanted.offset);
  EXPECT_EQ(request.call_site, wanted.call_site);
  EXPECT_EQ(back.value().cached, message.cached);
  EXPECT_EQ(back.value().forgotten, 300u);
  EXPECT_EQ(back.value().asked, message.asked);
  EXPECT_EQ(back.value().ended, message.ended);
  EXPECT_EQ(back.value().overdue, message.overdue);
  ASSERT_EQ(back.value().call_sites.size(), 2u);
  EXPECT_EQ(back.value().call_sites[0].text, "train.py:1");
  EXPECT_EQ(encode(back.value()), encode(message));
}

TEST(Messages, ResponsesComeBackAsTheyWere) {
  const ResponsesMessage message = some_responses();
  const Result<ResponsesMessage> back = decode_responses(encode(message));
  ASSERT_TRUE(back.ok()) << back.status().text();
  ASSERT_EQ(back.value().responses.size(), 2u);
  const Response& response = back.value().responses[0];
  EXPECT_EQ(response.call, std::uint64_t{1} << 33);
  EXPECT_EQ(response.new_process_set, 12);
  EXPECT_EQ(response.standing, 700);
  EXPECT_EQ(back.value().ended, message.ended);
  EXPECT_EQ(back.value().overdue, message.overdue);
  ASSERT_EQ(response.entries.size(), 2u);
  EXPECT_EQ(response.entries[0].first_dims, (std::vector<std::int64_t>{3, 4, 5}));
  EXPECT_EQ(response.entries[0].cache_id, 6u);
  EXPECT_EQ(response.entries[0].order, 0x110u);
  EXPECT_EQ(response.entries[0].devices, (std::vector<std::int64_t>{-1, 0, 7}));
  EXPECT_TRUE(response.entries[0].is_complex);
  EXPECT_FALSE(response.entries[1].is_complex);
  EXPECT_EQ(response.entries[0].more[0].order, 2u);
  EXPECT_EQ(back.value().responses[1].status().text(), "a text");
  EXPECT_EQ(back.value().evicted, message.evicted);
  EXPECT_EQ(encode(back.value()), encode(message));
}

TEST(Messages, AnEntryThatTravelsAsItsIdBringsTheIdAlone) {
  ResponsesMessage message = some_responses();
  const std::size_t whole = encode(message).size();
  message.as_cache_id[0] = true;
  EXPECT_LT(encode(message).size(), whole);
  const Result<ResponsesMessage> back = decode_responses(encode(message));
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back.value().as_cache_id, message.as_cache_id);
  EXPECT_EQ(back.value().responses[0].entries[0].cache_id, 6u);
  EXPECT_EQ(back.value().responses[0].entries[0].name, "");
  EXPECT_EQ(back.value().responses[0].entries[1].name, "b");
}

TEST(Messages, ASteadyStepCostsAFewBytesAName) {
  RequestsMessage message;
  for (CacheId id = 1; id <= 100; ++id) message.cached.push_back(id);
  EXPECT_LE(encode(message).size(), 110u);
}

TEST(Messages, TheOthersComeBackAsTheyWere) {
  EXPECT_EQ(encode(decode_peer_lost(encode(PeerLostMessage{-7, "gone"})).value()), encode(PeerLostMessage{-7, "gone"}));
  const CallFailedMessage failed{4, std::uint64_t{1} << 60, "why"};
  EXPECT_EQ(encode(decode_call_failed(encode(failed)).value()), encode(failed));
  const StallQueryMessage query = some_query();
  EXPECT_EQ(encode(decode_stall_query(encode(query)).value()), encode(query));
  const StallReportMessage report = some_report();
  EXPECT_EQ(encode(decode_stall_report(encode(report)).value()), encode(report));
  EXPECT_EQ(message_kind(encode_shutdown()).value(), MessageKind::kShutdown);
}

// Reads a message as every kind. Whether it can be read does not matter here, only that reading stays within it.
int readable_as(std::span<const std::byte> bytes) {
  return decode_requests(bytes).ok() + decode_responses(bytes).ok() + decode_peer_lost(bytes).ok() +
         decode_call_failed(bytes).ok() + decode_stall_query(bytes).ok() + decode_stall_report(bytes).ok();
}

std::vector<std::vector<std::byte>> one_of_each() {
  return {encode(some_requests()),
          encode(some_responses()),
          encode(PeerLostMessage{3, "gone"}),
          encode(CallFailedMessage{4, 5, "why"}),
          encode(some_query()),
          encode(some_report())};
}

TEST(Messages, ATruncatedOrExtendedOneIsRefused) {
  for (const std::vector<std::byte>& message : one_of_each()) {
    EXPECT_EQ(readable_as(message), 1);
    for (std::size_t size = 0; size < message.size(); ++size) {
      // A copy of just that size, so that an address sanitizer sees a step too far.
      const std::vector<std::byte> part(message.begin(), message.begin() + static_cast<std::ptrdiff_t>(size));
      EXPECT_EQ(readable_as(part), 0) << size << " bytes of " << message.size();
    }
    std::vector<std::byte> longer = message;
    longer.push_back(std::byte{0});
    EXPECT_EQ(readable_as(longer), 0);
  }
}

TEST(Messages, AnUnknownKindIsRefused) {
  EXPECT_FALSE(message_kind({}).ok());
  for (const int kind : {0, 8, 255}) {
    const std::vector<std::byte> message{static_cast<std::byte>(kind)};
    EXPECT_FALSE(message_kind(message).ok()) << kind;
  }
}

TEST(Messages, ChangedBytesAreReadWithoutHarm) {
  std::mt19937_64 random = generator_of_this_run();
  const auto messages = one_of_each();
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::byte> bytes = messages[random() % messages.size()];
    for (std::uint64_t changes = random() % 4 + 1; changes > 0; --changes) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    if (random() % 3 == 0) bytes.resize(random() % (bytes.size() + 1));
    readable_as(bytes);
  }
}

TEST(Shapes, AreCountedAndRefusedBeyondWhatCanBe) {
  EXPECT_EQ(element_count({}).value(), 1);
  EXPECT_EQ(element_count(Shape{3, 4}).value(), 12);
  EXPECT_EQ(element_count(Shape{3, 0, 5}).value(), 0);
  EXPECT_EQ(element_count(Shape{std::int64_t{1} << 59}).value(), std::int64_t{1} << 59);
  EXPECT_FALSE(element_count(Shape{std::int64_t{1} << 59, 2}).ok());
  EXPECT_FALSE(element_count(Shape{-1}).ok());
  EXPECT_FALSE(element_count(Shape{0, -1}).ok());
  EXPECT_EQ(shape_text(Shape{2, 3}), "[2, 3]");
  EXPECT_EQ(shape_text({}), "[]");
}

TEST(GeneratedNames, AreKnownAsSuch) {
  EXPECT_TRUE(is_generated_name(generated_name(5)));
  EXPECT_NE(generated_name(5), generated_name(6));
  EXPECT_FALSE(is_generated_name("layer.weight"));
}

}  // namespace
}  // namespace hvd::testing
