#include "ops/nccl/nccl_hierarchical_call.h"

#include <algorithm>
#include <utility>

#include "common/log.h"
#include "ops/activity.h"
#include "ops/host_backend.h"

namespace hvd {
namespace {

// Long enough for a ring over many hosts to send whole segments, and short beside a large share.
constexpr std::size_t kSegmentsPerPortion = 16;

constexpr const char* kWhat = "hierarchical allreduce";

/// Cuts a share so that all ranks that have it find the same.
class Portions {
 public:
  Portions(std::span<std::byte> share, std::size_t longest) : share_(share), longest_(longest) {}
  std::size_t count() const { return (share_.size() + longest_ - 1) / longest_; }
  std::span<std::byte> operator[](std::size_t index) const {
    const std::size_t begin = index * longest_;
    return share_.subspan(begin, std::min(longest_, share_.size() - begin));
  }

 private:
  std::span<std::byte> share_;
  std::size_t longest_;  // bytes of whole elements
};

std::size_t longest_portion(const CollectiveContext& context, DataType dtype) {
  const std::size_t element = std::max<std::size_t>(1, size_of(dtype));
  return std::max<std::size_t>(1, kSegmentsPerPortion * context.segment_bytes() / element) * element;
}

/// As the ranks of one share see the call: an average is divided where all ranks are known.
AllreduceCall between_hosts(const AllreduceCall& call, DataType dtype) {
  AllreduceCall between;
  between.dtype = dtype;
  between.reduce_op = call.reduce_op == ReduceOp::kAverage ? ReduceOp::kSum : call.reduce_op;
  between.small_limit_bytes = call.small_limit_bytes;
  return between;
}

}  // namespace

Task<Status> NcclHierarchicalCall::connect(CollectiveContext& context) {
  hierarchy_ = hierarchy_of(context.membership(), context.rank());
  const bool is_first = comm() == nullptr;
  const CollectiveContext::Part local(context, hierarchy_->local);
  local_rank_ = context.rank();
  HVD_CO_RETURN_IF_ERROR(co_await NcclCall::connect(context));
  if (is_first) {
    log::info(
        "process set {}: allreduces on devices go through NCCL within {} hosts of {} ranks, and between them as on "
        "host memory",
        settings().process_set, hierarchy_->cross->size(), hierarchy_->local->size());
  }
  co_return Status();
}

Task<Status> NcclHierarchicalCall::reduce(CollectiveContext& context, const AllreduceCall& call,
                                          AllreduceTensor whole) {
  const NcclReduction reduction = nccl_reduction(call.dtype, call.reduce_op);
  const Elements elements{whole, reduction, size_of(reduction.as)};
  const HostShares shares(whole.count, hierarchy_->local->size());
  std::byte* const own = whole.output + shares.begin(local_rank_) * elements.bytes;
  const std::span share(own, shares.count(local_rank_) * elements.bytes);
  {
    const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
    HVD_CO_RETURN_IF_ERROR(scatter_in_line(elements, shares));
    HVD_CO_RETURN_IF_ERROR(co_await settle(context, kWhat));
  }
  HVD_CO_RETURN_IF_ERROR(co_await reduce_between_hosts(context, call, share, reduction.as));
  const Activity moving(context.activities(), ActivityKind::kCommunicate, "nccl");
  HVD_CO_RETURN_IF_ERROR(gather_in_line(elements, shares));
  co_return co_await settle(context, kWhat);
}

Status NcclHierarchicalCall::scatter_in_line(const Elements& elements, const HostShares& shares) {
  const std::byte* const from = elements.whole.input;
  std::byte* const to = elements.whole.output;
  const std::size_t own = shares.begin(local_rank_) * elements.bytes;
  const std::size_t tail = shares.tail_begin() * elements.bytes;
  const nccl::ElementType type = elements.reduction.type;
  const nccl::RedOp op = elements.reduction.op;
  return in_group(kWhat, [&]() -> Status {
    if (shares.each > 0) {
      HVD_RETURN_IF_ERROR(
          checked(api().reduce_scatter(from, to + own, shares.each, type, op, comm(), stream()), kWhat));
    }
    if (shares.tail == 0) return {};
    return checked(api().reduce(from + tail, to + tail, shares.tail, type, op, shares.tail_rank(), comm(), stream()),
                   kWhat);
  });
}

Status NcclHierarchicalCall::gather_in_line(const Elements& elements, const HostShares& shares) {
  std::byte* const all = elements.whole.output;
  std::byte* const own = all + shares.begin(local_rank_) * elements.bytes;
  std::byte* const tail = all + shares.tail_begin() * elements.bytes;
  const nccl::ElementType type = elements.reduction.type;
  return in_group(kWhat, [&]() -> Status {
    if (shares.each > 0) {
      HVD_RETURN_IF_ERROR(checked(api().all_gather(own, all, shares.each, type, comm(), stream()), kWhat));
    }
    if (shares.tail == 0) return {};
    return checked(api().broadcast(tail, tail, shares.tail, type, shares.tail_rank(), comm(), stream()), kWhat);
  });
}

// The copies of one stream are in order: a slot is not written before what was in it has gone back to the device.
Task<Status> NcclHierarchicalCall::reduce_between_hosts(CollectiveContext& context, const AllreduceCall& call,
                                                        std::span<std::byte> share, DataType dtype) {
  if (share.empty()) co_return Status();
  const std::size_t longest = longest_portion(context, dtype);
  const Portions portions(share, longest);
  HVD_CO_RETURN_IF_ERROR(reserve(context, std::min(share.size(), longest)));
  std::array<DeviceMarkRef, kSlots> fetched;
  const auto begin_fetch = [&](std::size_t portion) -> Status {
    if (portion >= portions.count()) return {};
    Result<DeviceMarkRef> mark = fetch(portions[portion], portion % kSlots);
    if (mark) fetched[portion % kSlots] = mark.value();
    return mark.status();
  };
  for (std::size_t i = 0; i < kSlots; ++i) HVD_CO_RETURN_IF_ERROR(begin_fetch(i));
  const CollectiveContext::Part cross(context, hierarchy_->cross);
  const std::span<std::byte> no_fusion;
  for (std::size_t i = 0; i < portions.count(); ++i) {
    HVD_CO_RETURN_IF_ERROR(co_await reach(context, fetched[i % kSlots]));
    const std::span<std::byte> portion = portions[i];
    std::byte* const place = slots_[i % kSlots];
    AllreduceCall between = between_hosts(call, dtype);
    between.tensors.push_back({place, place, portion.size() / size_of(dtype)});
    HVD_CO_RETURN_IF_ERROR(co_await host_allreduce(context, std::move(between), no_fusion));
    HVD_CO_RETURN_IF_ERROR(copy(portion.data(), place, portion.size()));
    HVD_CO_RETURN_IF_ERROR(begin_fetch(i + kSlots));
  }
  co_return Status();
}

Status NcclHierarchicalCall::reserve(CollectiveContext& context, std::size_t bytes) {
  if (bytes <= slot_bytes_) return {};
  for (std::byte*& slot : slots_) {
    Result<std::shared_ptr<std::byte>> memory = devices().memory().lease_pinned(bytes);
    if (!memory) return memory.status();
    slot = memory.value().get();
    context.hold(memory.value());  // transports may need it for longer than the call lasts
    pinned_.push_back(std::move(memory).value());
  }
  slot_bytes_ = bytes;
  return {};
}

Result<DeviceMarkRef> NcclHierarchicalCall::fetch(std::span<const std::byte> portion, std::size_t slot) {
  HVD_RETURN_IF_ERROR(copy(slots_[slot], portion.data(), portion.size()));
  return devices().events().mark(settings().device, stream());
}

}  // namespace hvd
