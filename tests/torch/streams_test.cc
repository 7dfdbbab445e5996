// Gradients on CUDA devices and on several of their streams, without CUDA: LibTorch is given devices whose memory is
// the host's, and the functions of the C ABI that a reduction calls are these here. Both write down what they are asked
// for.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/accumulate.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/torch.h>

struct hvd_handle {
  int device;
};

namespace {

using at::Tensor;
using hvd::torch::detail::GradientReduction;
using Log = std::vector<std::string>;

constexpr std::int64_t kMain = 5;
constexpr std::int64_t kSide = 7;

Log events;
std::array<std::int64_t, 2> current{};  // stream of each device

std::string text(at::Device device, std::int64_t stream) {
  return std::to_string(device.index()) + ":" + std::to_string(stream);
}
std::string text(const c10::Stream& stream) { return text(stream.device(), stream.id()); }

class FakeCuda : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Device getDevice() const override { return {type(), 0}; }
  void setDevice(c10::Device /*device*/) const override {}
  void uncheckedSetDevice(c10::Device /*device*/) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current.at(static_cast<std::size_t>(device.index())));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void* getStreamNativeHandle(c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());  // NOLINT(performance-no-int-to-ptr): nobody follows it
  }
  c10::DeviceIndex deviceCount() const noexcept override { return current.size(); }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex /*device*/,
              c10::EventFlag /*flag*/) const override {
    *event = new std::string(text(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    events.push_back(text(stream) + " waits for " + *static_cast<std::string*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<std::string*>(event);
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeCuda)

Tensor on_device(const c10::Device& device, at::IntArrayRef shape = {4}) {
  const auto memory = std::make_shared<std::vector<float>>(c10::multiply_integers(shape));
  const auto options = at::TensorOptions(at::kFloat).device(device);
  return at::for_blob(memory->data(), shape)
      .deleter([memory](void*) {})
      .options(options)
      .target_device(device)
      .make_tensor();
}
Tensor on_device(at::DeviceIndex device) { return on_device({at::kCUDA, device}); }

// As many kernels as buckets need, for tensors of float32.
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("record_stream",
               [](Tensor& /*tensor*/, c10::Stream stream) { events.push_back("claim " + text(stream)); });
  library.impl("empty.memory_format",
               [](at::IntArrayRef shape, std::optional<at::ScalarType>, std::optional<at::Layout>,
                  std::optional<at::Device> device, std::optional<bool>,
                  std::optional<at::MemoryFormat>) { return on_device(*device, shape); });
  library.impl("zero_", [](Tensor& tensor) -> Tensor& { return tensor; });  // on_device() makes zeros
  library.impl("set_.source_Storage_storage_offset",
               [](Tensor& tensor, at::Storage memory, std::int64_t offset, at::IntArrayRef shape,
                  at::IntArrayRef strides) -> Tensor& {
                 tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(memory));
                 tensor.unsafeGetTensorImpl()->set_sizes_and_strides(shape, strides, offset);
                 return tensor;
               });
}

struct Net {
  hvd::torch::NamedTensors named;
  std::vector<Tensor> parameters;

  void add(const Tensor& parameter) {
    parameter.requires_grad_();
    named.emplace_back("parameter" + std::to_string(parameters.size()), parameter);
    parameters.push_back(parameter);
  }
  GradientReduction reduction(const hvd::torch::DistributedOptions& options = {}) const {
    return {named, parameters, options, std::source_location::current()};
  }
  // What backward does, on the stream of the parameter's forward.
  void backward(std::size_t index, const Tensor& gradient, std::int64_t stream = kMain) const {
    const Tensor& parameter = parameters[index];
    current[0] = stream;
    parameter.mutable_grad() = gradient;
    (*torch::autograd::impl::post_acc_grad_hooks(parameter))(parameter);
    current[0] = kMain;
  }
};

class Streams : public testing::Test {
 protected:
  void SetUp() override {
    events.clear();
    current = {kMain, kMain};
  }
  Net net_;
};

TEST_F(Streams, AGroupWaitsForAllThatMadeItsParts) {
  for (int i = 0; i < 3; ++i) net_.add(on_device(0));
  GradientReduction reduction = net_.reduction({.group_count = 1});
  for (int step = 0; step < 2; ++step) {
    events.clear();
    net_.backward(0, on_device(0), kSide);
    net_.backward(1, on_device(0), kMain);
    EXPECT_EQ(events, Log());
    net_.backward(2, on_device(0), kMain);
    EXPECT_EQ(events, (Log{"0:5 waits for 0:7", "claim 0:5", "claim 0:5", "claim 0:5", "enqueue on 0:5"}));
    events.clear();
    reduction.synchronize();
    EXPECT_EQ(events, (Log{"results on 0:5", "claim 0:5", "claim 0:5", "claim 0:5"}));
  }
}

TEST_F(Streams, OneStreamWaitsForNone) {
  for (int i = 0; i < 2; ++i) net_.add(on_device(0));
  const GradientReduction reduction = net_.reduction({.group_count = 1});
  for (std::size_t i = 0; i < 2; ++i) net_.backward(i, on_device(0), kSide);
  EXPECT_EQ(events, (Log{"enqueue on 0:7"}));
}

TEST_F(Streams, ABucketWaitsForAllThatMadeItsParts) {
  for (int i = 0; i < 3; ++i) net_.add(on_device(0));
  GradientReduction reduction = net_.reduction({.gradient_as_bucket_view = true});
  reduction.synchronize();  // from then on gradients are views
  for (int step = 0; step < 2; ++step) {
    events.clear();
    net_.backward(0, net_.parameters[0].grad(), kSide);
    net_.backward(1, net_.parameters[1].grad(), kSide);
    EXPECT_EQ(events, Log());
    net_.backward(2, net_.parameters[2].grad(), kMain);
    EXPECT_EQ(events, (Log{"0:5 waits for 0:7", "enqueue on 0:5"}));
    events.clear();
    reduction.synchronize();
    EXPECT_EQ(events, (Log{"results on 0:5", "claim 0:5"}));
  }
}

TEST_F(Streams, TheStreamOfEachDeviceWaitsForItsResults) {
  net_.add(at::ones({4}));  // as an embedding that is too large for a device
  net_.add(on_device(0));
  net_.add(on_device(1));
  current[1] = kSide;
  GradientReduction reduction = net_.reduction();
  net_.backward(0, at::ones({4}));
  net_.backward(1, on_device(0));
  net_.backward(2, on_device(1));
  EXPECT_EQ(events, (Log{"enqueue", "enqueue on 0:5", "enqueue on 1:7"}));
  events.clear();
  reduction.synchronize();
  std::sort(events.begin(), events.end());
  EXPECT_EQ(events, (Log{"claim 0:5", "claim 1:7", "results on 0:5", "results on 1:7"}));
}

}  // namespace

// ---- the C ABI ------------------------------------------------------------------------------------------------------

extern "C" {

int hvd_get_topology(hvd_topology* topology) {
  topology->rank = 0;
  return HVD_OK;
}
int hvd_process_set_ranks(int32_t /*id*/, int32_t* ranks, int32_t capacity, int32_t* count) {
  *count = 2;
  for (int32_t rank = 0; rank < std::min(capacity, *count); ++rank) ranks[rank] = rank;
  return HVD_OK;
}
int hvd_enqueue(const hvd_operation* operation, hvd_handle** handle) {
  const hvd_tensor& input = operation->group_count > 0 ? operation->group_inputs[0] : operation->input;
  const bool on_host = input.memory_kind == HVD_HOST;
  const std::string stream = std::to_string(reinterpret_cast<std::intptr_t>(operation->stream));
  events.push_back(on_host ? "enqueue" : "enqueue on " + std::to_string(input.device) + ":" + stream);
  *handle = new hvd_handle{on_host ? -1 : input.device};
  operation->release(operation->keep_alive);
  return HVD_OK;
}
int hvd_handle_wait(hvd_handle* /*handle*/, int64_t /*limit_nanoseconds*/) { return HVD_OK; }
int hvd_handles_wait(hvd_handle* const* /*handles*/, int32_t /*count*/, int64_t /*limit_nanoseconds*/) {
  return HVD_OK;
}
int hvd_handles_stream_wait(hvd_handle* const* handles, int32_t count, void* stream) {
  for (int32_t i = 0; i < count; ++i) {
    EXPECT_EQ(handles[i]->device, handles[0]->device) << "a stream waits for another device";
  }
  events.push_back("results on " + std::to_string(handles[0]->device) + ":" +
                   std::to_string(reinterpret_cast<std::intptr_t>(stream)));
  return HVD_OK;
}
void hvd_handle_destroy(hvd_handle* handle) { delete handle; }

}  // extern "C"
