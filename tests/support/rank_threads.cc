#include "tests/support/rank_threads.h"

#include <numeric>
#include <thread>
#include <utility>

#include "common/check.h"

namespace hvd::testing {
namespace {

MembershipRef everyone(int size, std::vector<int> hosts) {
  auto membership = std::make_shared<Membership>();
  membership->ranks.resize(static_cast<std::size_t>(size));
  std::iota(membership->ranks.begin(), membership->ranks.end(), 0);
  if (hosts.empty()) hosts.assign(static_cast<std::size_t>(size), 0);
  membership->hosts = std::move(hosts);
  return membership;
}

}  // namespace

TensorEntry make_entry(OpKind op, const std::string& name, DataType dtype, Shape shape, const void* input,
                       void* output) {
  TensorEntry entry;
  entry.request.key = {0, op, name};
  entry.request.dtype = dtype;
  entry.request.shape = std::move(shape);
  entry.input = static_cast<const std::byte*>(input);
  entry.output = static_cast<std::byte*>(output);
  return entry;
}

TestRank::TestRank(InprocNetwork& network, int rank, Settings settings) {
  Result<std::unique_ptr<EpollPoller>> poller = EpollPoller::create(clock_);
  HVD_CHECK(poller.ok());
  poller_ = std::move(poller).value();
  auto fabric = std::make_unique<Fabric>(rank, network.size());
  Transport& transport = fabric->add(network.connect(rank, *poller_, {}));
  for (int peer = 0; peer < network.size(); ++peer) {
    fabric->route_control(peer, transport);
    fabric->route_data(peer, transport);
  }
  fabric->share_blocks(network.slot_bytes());
  Runtime::Settings runtime_settings;
  runtime_settings.everyone = everyone(network.size(), std::move(settings.hosts));
  runtime_settings.process_sets = std::move(settings.process_sets);
  runtime_settings.options = settings.options;
  runtime_settings.fault = settings.fault;
  runtime_settings.devices = settings.devices;
  timeline_ = std::make_unique<Timeline>(clock_, rank, network.size());
  if (!settings.timeline.empty()) HVD_CHECK(timeline_->start(settings.timeline, settings.timeline_mark_cycles).ok());
  runtime_settings.timeline = timeline_.get();
  runtime_ = std::make_unique<Runtime>(std::move(fabric), clock_, std::move(runtime_settings));
  loop_ = std::make_unique<BackgroundLoop>(*runtime_, *poller_);
}

Result<HandleRef> TestRank::enqueue(TensorEntry entry, const CallSite& call_site) {
  auto handle = std::make_shared<HandleState>();
  entry.handle = handle;
  HVD_RETURN_IF_ERROR(runtime_->enqueue(std::move(entry), call_site));
  loop_->notify();
  return handle;
}

Result<HandleRef> TestRank::allreduce_async(const std::string& name, std::span<const float> input,
                                            std::span<float> output, ReduceOp op, ProcessSetId process_set) {
  TensorEntry entry = make_entry(OpKind::kAllreduce, name, DataType::kFloat32,
                                 {static_cast<std::int64_t>(input.size())}, input.data(), output.data());
  entry.request.reduce_op = op;
  entry.request.key.process_set = process_set;
  return enqueue(std::move(entry));
}

Result<HandleRef> TestRank::barrier_async(const std::string& name, ProcessSetId process_set) {
  TensorEntry entry = make_entry(OpKind::kBarrier, name, DataType::kUint8, {}, nullptr, nullptr);
  entry.request.key.process_set = process_set;
  return enqueue(std::move(entry));
}

Result<ProcessSetId> TestRank::add_process_set(const std::vector<int>& ranks) {
  TensorEntry entry =
      make_entry(OpKind::kProcessSetAdd, "add", DataType::kUint8, Shape(ranks.begin(), ranks.end()), nullptr, nullptr);
  const Result<HandleRef> handle = enqueue(std::move(entry));
  HVD_RETURN_IF_ERROR(wait(handle));
  return handle.value()->output().process_set;
}

Status TestRank::wait(const Result<HandleRef>& handle) {
  if (!handle.ok()) return handle.status();
  if (!loop_->wait(*handle.value(), clock_.now() + std::chrono::seconds(60))) {
    return Status::deadline_exceeded("the operation did not end within 60 s");
  }
  return handle.value()->status();
}

void run_ranks(int size, const std::function<void(TestRank&)>& body, TestRank::Settings settings) {
  InprocNetwork network(size, std::size_t{256} << 10, true);
  std::vector<std::unique_ptr<TestRank>> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.push_back(std::make_unique<TestRank>(network, rank, settings));
  {
    std::vector<std::jthread> threads;
    for (auto& rank : ranks) {
      threads.emplace_back([&body, &rank] {
        body(*rank);
        rank->shut_down();
      });
    }
  }
}

}  // namespace hvd::testing
