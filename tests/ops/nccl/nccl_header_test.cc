// ops/nccl/nccl_api.h against NCCL's own header, where this machine has one: numbers, layouts and the types of all
// calls.
#include "ops/nccl/nccl_api.h"

#include <gtest/gtest.h>

#ifdef HVD_HAS_NCCL_HEADER
#include <nccl.h>

#include <cstddef>
#include <type_traits>

namespace hvd::nccl {
namespace {

// The same number of parameters, each as wide and of one kind with ours: then the calling convention is the same.
template <typename One, typename Other>
inline constexpr bool kAlike = sizeof(One) == sizeof(Other) && std::is_pointer_v<One> == std::is_pointer_v<Other> &&
                               std::is_class_v<One> == std::is_class_v<Other>;

template <typename Ours, typename Theirs>
struct SameCall : std::false_type {};
template <typename OurResult, typename... Ours, typename TheirResult, typename... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
struct SameCall<OurResult (*)(Ours...), TheirResult (*)(Theirs...)>
    : std::bool_constant<kAlike<OurResult, TheirResult> && (kAlike<Ours, Theirs> && ...)> {};

#define HVD_SAME_CALL(ours, theirs) static_assert(SameCall<decltype(Api::ours), decltype(&::theirs)>::value, #theirs)
HVD_SAME_CALL(get_version, ncclGetVersion);
HVD_SAME_CALL(get_unique_id, ncclGetUniqueId);
HVD_SAME_CALL(comm_init_rank_config, ncclCommInitRankConfig);
HVD_SAME_CALL(comm_get_async_error, ncclCommGetAsyncError);
HVD_SAME_CALL(comm_finalize, ncclCommFinalize);
HVD_SAME_CALL(comm_destroy, ncclCommDestroy);
HVD_SAME_CALL(comm_abort, ncclCommAbort);
HVD_SAME_CALL(get_last_error, ncclGetLastError);
HVD_SAME_CALL(get_error_string, ncclGetErrorString);
HVD_SAME_CALL(group_start, ncclGroupStart);
HVD_SAME_CALL(group_end, ncclGroupEnd);
HVD_SAME_CALL(all_reduce, ncclAllReduce);
HVD_SAME_CALL(all_gather, ncclAllGather);
HVD_SAME_CALL(reduce_scatter, ncclReduceScatter);
HVD_SAME_CALL(broadcast, ncclBroadcast);
HVD_SAME_CALL(reduce, ncclReduce);
HVD_SAME_CALL(send, ncclSend);
HVD_SAME_CALL(receive, ncclRecv);
#if NCCL_VERSION_CODE >= 21901
HVD_SAME_CALL(mem_alloc, ncclMemAlloc);
HVD_SAME_CALL(mem_free, ncclMemFree);
HVD_SAME_CALL(comm_register, ncclCommRegister);
HVD_SAME_CALL(comm_deregister, ncclCommDeregister);
#endif
#undef HVD_SAME_CALL

static_assert(sizeof(UniqueId) == sizeof(::ncclUniqueId));
static_assert(offsetof(Config, blocking) == offsetof(::ncclConfig_t, blocking));
static_assert(offsetof(Config, net_name) == offsetof(::ncclConfig_t, netName));
static_assert(offsetof(Config, split_share) == offsetof(::ncclConfig_t, splitShare));
static_assert(sizeof(Config) <= sizeof(::ncclConfig_t));

TEST(NcclHeader, NumbersAreThoseOfNccl) {
  EXPECT_EQ(static_cast<int>(kSuccess), ::ncclSuccess);
  EXPECT_EQ(static_cast<int>(kUnhandledCudaError), ::ncclUnhandledCudaError);
  EXPECT_EQ(static_cast<int>(kSystemError), ::ncclSystemError);
  EXPECT_EQ(static_cast<int>(kInternalError), ::ncclInternalError);
  EXPECT_EQ(static_cast<int>(kInvalidArgument), ::ncclInvalidArgument);
  EXPECT_EQ(static_cast<int>(kInvalidUsage), ::ncclInvalidUsage);
  EXPECT_EQ(static_cast<int>(kRemoteError), ::ncclRemoteError);
  EXPECT_EQ(static_cast<int>(kInProgress), ::ncclInProgress);
  EXPECT_EQ(static_cast<int>(kInt8), ::ncclInt8);
  EXPECT_EQ(static_cast<int>(kUint8), ::ncclUint8);
  EXPECT_EQ(static_cast<int>(kInt32), ::ncclInt32);
  EXPECT_EQ(static_cast<int>(kUint32), ::ncclUint32);
  EXPECT_EQ(static_cast<int>(kInt64), ::ncclInt64);
  EXPECT_EQ(static_cast<int>(kUint64), ::ncclUint64);
  EXPECT_EQ(static_cast<int>(kFloat16), ::ncclFloat16);
  EXPECT_EQ(static_cast<int>(kFloat32), ::ncclFloat32);
  EXPECT_EQ(static_cast<int>(kFloat64), ::ncclFloat64);
  EXPECT_EQ(static_cast<int>(kBfloat16), 9);  // ncclBfloat16, which the header has for compilers of CUDA alone
  EXPECT_EQ(static_cast<int>(kSum), ::ncclSum);
  EXPECT_EQ(static_cast<int>(kProd), ::ncclProd);
  EXPECT_EQ(static_cast<int>(kMax), ::ncclMax);
  EXPECT_EQ(static_cast<int>(kMin), ::ncclMin);
  EXPECT_EQ(static_cast<int>(kAvg), ::ncclAvg);
}

TEST(NcclHeader, AConfigurationBeginsAsNcclsInitialiserDoes) {
  const ::ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const Config ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_EQ(ours.blocking, theirs.blocking);
  EXPECT_EQ(ours.max_ctas, theirs.maxCTAs);
  EXPECT_EQ(ours.net_name, theirs.netName);
  EXPECT_EQ(ours.split_share, theirs.splitShare);
}

}  // namespace
}  // namespace hvd::nccl

#else

TEST(NcclHeader, NumbersAreThoseOfNccl) { GTEST_SKIP() << "this machine has no nccl.h"; }

#endif
