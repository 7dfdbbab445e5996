// What a call of hvd_enqueue costs in memory: nothing, once operations of its kind have been done before.
#include <horovod_cpp/c_api.h>

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <new>
#include <string>
#include <vector>

namespace {

thread_local bool counting = false;
thread_local int allocations = 0;

}  // namespace

// In place of those of the C++ library, for the program and for libhorovod_cpp.so in it. Not inline: GCC would find
// new and free to be no pair.
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (counting) ++allocations;
  if (void* const memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t alignment) {
  if (counting) ++allocations;
  const auto multiple = static_cast<std::size_t>(alignment);
  if (void* const memory = std::aligned_alloc(multiple, (size + multiple - 1) / multiple * multiple)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t /*size*/) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t /*size*/, std::align_val_t /*alignment*/) noexcept {
  std::free(memory);
}

namespace {

class EnqueueTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(hvd_init(nullptr), HVD_OK) << hvd_last_error(); }
  void TearDown() override { hvd_shutdown(); }
};

hvd_operation operation_on(std::vector<float>& values, const std::int64_t& count, const char* name, int line) {
  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = HVD_ALLREDUCE;
  operation.reduce_op = HVD_SUM;
  operation.prescale = operation.postscale = 1.0;
  operation.name = name;
  operation.call_site_file = "a/folder/with/a/long/name/train.py";
  operation.call_site_line = line;
  operation.input = {values.data(), &count, 1, HVD_FLOAT32, HVD_HOST, 0, nullptr};
  operation.output = operation.input;
  operation.keep_alive = &values;
  operation.release = [](void* owner) { static_cast<std::vector<float>*>(owner)->front() += 1; };
  return operation;
}

// How many allocations the calls of a step make, each operation under the name and from the line of the step before.
// `caller_waits`: nobody takes the operations up before all are in.
int allocations_of_a_step(std::vector<std::vector<float>>& tensors, const std::vector<std::string>& names,
                          bool caller_waits) {
  int made = 0;
  std::vector<hvd_handle*> handles;
  handles.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto count = static_cast<std::int64_t>(tensors[i].size());
    hvd_operation operation = operation_on(tensors[i], count, names[i].c_str(), static_cast<int>(i));
    operation.caller_waits = caller_waits ? 1 : 0;
    hvd_handle* handle = nullptr;
    allocations = 0;
    counting = true;
    const int code = hvd_enqueue(&operation, &handle);
    counting = false;
    made += allocations;
    EXPECT_EQ(code, HVD_OK) << hvd_last_error();
    handles.push_back(handle);
  }
  for (hvd_handle* const handle : handles) {
    EXPECT_EQ(hvd_handle_wait(handle, -1), HVD_OK) << hvd_last_error();
    hvd_handle_destroy(handle);
  }
  return made;
}

TEST_F(EnqueueTest, AllocatesNothingInAStepLikeTheOneBefore) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "nothing is kept for reuse under AddressSanitizer";
#endif
  constexpr int kTensors = 161;  // as many gradients as ResNet-50 has
  std::vector<std::vector<float>> tensors(kTensors, std::vector<float>(17));
  std::vector<std::string> names;
  for (int i = 0; i < kTensors; ++i) {
    names.push_back("allreduce.layer" + std::to_string(100 + i) + ".conv.weight.gradient");
  }
  EXPECT_GT(allocations_of_a_step(tensors, names, true), 0) << "what counts does not see the library";
  for (int i = 0; i < 5; ++i) allocations_of_a_step(tensors, names, true);  // all of them are in flight at a time
  EXPECT_EQ(allocations_of_a_step(tensors, names, true), 0);
  EXPECT_EQ(allocations_of_a_step(tensors, names, false), 0);
}

TEST_F(EnqueueTest, AHandleUsedAgainKnowsNothingOfItsFormerOperation) {
  std::vector<float> first(6, 1.0f);
  std::vector<float> second(2, 5.0f);
  for (std::vector<float>* values : {&first, &second}) {
    const auto count = static_cast<std::int64_t>(values->size());
    const hvd_operation operation = operation_on(*values, count, "x", 1);
    hvd_handle* handle = nullptr;
    ASSERT_EQ(hvd_enqueue(&operation, &handle), HVD_OK) << hvd_last_error();
    ASSERT_EQ(hvd_handle_wait(handle, -1), HVD_OK) << hvd_last_error();
    hvd_output output;
    HVD_INIT_STRUCT(&output);
    ASSERT_EQ(hvd_handle_output(handle, &output), HVD_OK);
    EXPECT_EQ(output.data, values->data());
    ASSERT_EQ(output.dimensions, 1);
    EXPECT_EQ(output.shape[0], count);
    EXPECT_NE(hvd_handle_group_output(handle, 1, &output), HVD_OK) << "there is one output";
    hvd_handle_destroy(handle);
  }
}

TEST_F(EnqueueTest, ARefusedOperationReleasesNothing) {
  std::vector<float> values(3, 0.0f);
  const std::int64_t count = 3;
  hvd_operation operation = operation_on(values, count, "refused", 1);
  operation.process_set = 7;
  hvd_handle* handle = nullptr;
  EXPECT_EQ(hvd_enqueue(&operation, &handle), HVD_INVALID_ARGUMENT);
  hvd_collect_released();
  EXPECT_EQ(values.front(), 0.0f);

  operation.process_set = 0;
  ASSERT_EQ(hvd_enqueue(&operation, &handle), HVD_OK) << hvd_last_error();
  ASSERT_EQ(hvd_handle_wait(handle, -1), HVD_OK) << hvd_last_error();
  hvd_handle_destroy(handle);
  hvd_shutdown();
  EXPECT_EQ(values.front(), 1.0f) << "released once";
}

}  // namespace
