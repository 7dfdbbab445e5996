#include "tests/support/device_job.h"

namespace hvd::testing {

using namespace std::chrono_literals;

std::vector<std::byte> elements(DataType dtype, std::size_t count, int rank) {
  std::vector<std::byte> bytes(count * size_of(dtype));
  for (std::size_t i = 0; i < count; ++i) {
    const int value = 1 + static_cast<int>(i + static_cast<std::size_t>(rank)) % 3;
    std::byte* const place = bytes.data() + i * size_of(dtype);
    const auto put = [place](auto typed) { std::memcpy(place, &typed, sizeof typed); };
    switch (dtype) {
      case DataType::kInt16:
        put(static_cast<std::int16_t>(value));
        break;
      case DataType::kInt32:
        put(static_cast<std::int32_t>(value));
        break;
      case DataType::kInt64:
        put(static_cast<std::int64_t>(value));
        break;
      case DataType::kFloat32:
        put(static_cast<float>(value));
        break;
      case DataType::kFloat64:
        put(static_cast<double>(value));
        break;
      case DataType::kFloat16:
        put(static_cast<std::uint16_t>(value == 1 ? 0x3c00 : value == 2 ? 0x4000 : 0x4200));
        break;
      case DataType::kBfloat16:
        put(static_cast<std::uint16_t>(value == 1 ? 0x3f80 : value == 2 ? 0x4000 : 0x4040));
        break;
      case DataType::kBool:
        put(static_cast<std::uint8_t>(value % 2));
        break;
      default:
        put(static_cast<std::uint8_t>(value));
    }
  }
  return bytes;
}

std::vector<std::byte> on_host(DeviceRank& rank, TensorEntry entry, std::size_t bytes) {
  std::vector<std::byte> result(bytes);
  entry.output = result.data();
  const Result<HandleRef> handle = rank.hvd->enqueue(std::move(entry));
  const Status status = rank.hvd->wait(handle);
  EXPECT_TRUE(status.ok()) << status.text();
  if (status.ok() && !handle.value()->output().tensors.empty()) {
    const OutputTensor& made = handle.value()->output().tensors.front();
    result.assign(made.memory.get(), made.memory.get() + made.bytes);
  }
  return result;
}

Status allreduce_once(DeviceRank& rank, const std::string& name, std::size_t count) {
  float* const place = rank.produce(std::vector<float>(count, 1.0f));
  HVD_RETURN_IF_ERROR(rank.run(
      rank.entry(OpKind::kAllreduce, name, DataType::kFloat32, {static_cast<std::int64_t>(count)}, place, place)));
  const std::vector<float> seen = rank.consume<float>(place, count);
  if (seen != std::vector<float>(count, static_cast<float>(rank.hvd->size()))) return Status::internal("wrong values");
  return {};
}

Status allreduce_int16(DeviceRank& rank, const std::string& name, std::size_t count, ProcessSetId set, int members) {
  const auto own = static_cast<std::int16_t>(rank.rank() + 1);
  std::int16_t* const place = rank.produce(std::vector<std::int16_t>(count, own));
  TensorEntry entry =
      rank.entry(OpKind::kAllreduce, name, DataType::kInt16, {static_cast<std::int64_t>(count)}, place, place);
  entry.request.key.process_set = set;
  const Status status = rank.run(std::move(entry));
  if (!status.ok()) return status;
  if (members == 0) members = rank.hvd->size();
  const auto total = static_cast<std::int16_t>(members * (members + 1) / 2);
  EXPECT_EQ(rank.consume<std::int16_t>(place, count), std::vector<std::int16_t>(count, total)) << name;
  return status;
}

void expect_host_works(DeviceRank& rank, const std::string& name) {
  std::vector<float> values(3, 1.0f);
  const Status status = rank.hvd->allreduce(name, values, values);
  EXPECT_TRUE(status.ok()) << status.text();
}

void expect_all_communicators_end(DeviceJob& job) {
  const auto end = std::chrono::steady_clock::now() + 30s;
  while (job.nccl().alive_communicators() > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(1ms);
  }
  EXPECT_EQ(job.nccl().alive_communicators(), 0u);
}

}  // namespace hvd::testing
