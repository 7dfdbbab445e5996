// Collective operations on host memory: blocking ones, and `_async` ones that return a Handle at once. Any thread.
//
// Memory is anything that std::span takes (std::vector, std::array, an array, a span) of elements as element.h says;
// the library sees it as one dimension. Names are keys: an operation meets the one of the same kind, process set and
// name on the other ranks, in whatever order ranks call; unnamed ones are counted. All throw InvalidArgument for a
// mistake of the caller, a name that is in flight already or ranks that disagree; PreconditionError before init, after
// shutdown or outside the process set; InternalError for a lost rank. `_async` ones throw what the ranks find out
// together in wait().
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <ranges>
#include <source_location>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <horovod_cpp/c_api.h>
#include <horovod_cpp/element.h>
#include <horovod_cpp/handle.h>
#include <horovod_cpp/process_set.h>
#include <horovod_cpp/reduce_op.h>

namespace hvd {

/// Of allreduce and reducescatter.
struct ReduceOptions {
  ReduceOp op = ReduceOp::kAverage;  ///< an average of integers is cut to an integer; reducescatter: average or sum
  double prescale = 1.0;             ///< factor before the reduction
  double postscale = 1.0;            ///< and after it
  ProcessSet process_set{};
  std::string name{};  ///< equal on all ranks; empty: made from a counter of the process set
};

/// Of the other operations.
struct CollectiveOptions {
  ProcessSet process_set{};
  std::string name{};
};

namespace detail {

using Site = std::source_location;

/// A range that may be used while its handle lives: a named one, or a view.
template <typename R>
concept Lasting = std::ranges::borrowed_range<R>;

template <typename R>
using ElementOf = std::remove_cv_t<std::ranges::range_value_t<R>>;

inline std::string operation_text(const char* kind, const std::string& name) {
  return name.empty() ? std::string("unnamed ") + kind : std::string(kind) + " '" + name + "'";
}

/// What is handed over to the C ABI. Dense memory of `count` elements has the shape (count).
class Call {
 public:
  Call(hvd_op op, const char* kind, ProcessSet process_set, const std::string& name, bool caller_waits, Site site)
      : kind_(kind), name_(name), site_(site) {
    HVD_INIT_STRUCT(&operation_);
    operation_.op = op;
    operation_.process_set = process_set.id();
    operation_.prescale = operation_.postscale = 1.0;
    operation_.call_site_file = site.file_name();
    operation_.call_site_line = static_cast<std::int32_t>(site.line());
    operation_.caller_waits = caller_waits ? 1 : 0;
  }
  Call(hvd_op op, const char* kind, const ReduceOptions& options, bool caller_waits, Site site)
      : Call(op, kind, options.process_set, options.name, caller_waits, site) {
    operation_.reduce_op = static_cast<std::int32_t>(options.op);
    operation_.prescale = options.prescale;
    operation_.postscale = options.postscale;
  }

  Call& root(int root_rank) {
    operation_.root_rank = root_rank;
    return *this;
  }
  Call& splits(std::span<const std::int64_t> splits) {
    static constexpr std::int64_t kNone = 0;  // an empty span may have no address, and NULL means equal shares
    operation_.splits = splits.empty() ? &kNone : splits.data();
    operation_.split_count = static_cast<std::int32_t>(splits.size());
    return *this;
  }

  /// The library makes the output, if there is one.
  template <Element T>
  Operation start(std::span<const T> input) {
    const auto count = static_cast<std::int64_t>(input.size());
    operation_.input = tensor(const_cast<T*>(input.data()), count);
    return start();
  }
  template <Element T>
  Operation start(std::span<const T> input, std::span<T> output) {
    if (output.size() != input.size()) {
      const std::string sizes = std::to_string(input.size()) + " elements, the output " + std::to_string(output.size());
      raise(StatusCode::kInvalidArgument, text(), "the input has " + sizes, site_);
    }
    const auto count = static_cast<std::int64_t>(input.size());
    operation_.input = tensor(const_cast<T*>(input.data()), count);
    operation_.output = tensor(output.data(), count);
    return start();
  }
  /// Several tensors as one operation. `into_inputs`: reduced in place; otherwise the library makes the outputs.
  template <typename T>
  Operation start_group(std::span<const std::span<T>> parts, bool into_inputs) {
    std::vector<std::int64_t> counts;
    for (const std::span<T> part : parts) counts.push_back(static_cast<std::int64_t>(part.size()));
    std::vector<hvd_tensor> tensors;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      tensors.push_back(tensor(const_cast<std::remove_const_t<T>*>(parts[i].data()), counts[i]));
    }
    if (tensors.empty()) raise(StatusCode::kInvalidArgument, text(), "the group is empty", site_);
    operation_.group_count = static_cast<std::int32_t>(tensors.size());
    operation_.group_inputs = tensors.data();
    if (into_inputs) operation_.group_outputs = tensors.data();
    return start();
  }
  Operation start() {
    if (name_.find('\0') != std::string::npos) {
      raise(StatusCode::kInvalidArgument, kind_, "a name may not contain a zero byte", site_);
    }
    operation_.name = name_.empty() ? nullptr : name_.c_str();
    hvd_handle* handle = nullptr;
    check(hvd_enqueue(&operation_, &handle), text(), site_);
    return {handle, text(), site_, std::max(operation_.group_count, 1)};
  }

 private:
  template <Element T>
  static hvd_tensor tensor(T* data, const std::int64_t& count) {
    const std::int32_t complex = kIsComplex<T> ? HVD_COMPLEX : 0;
    return {data, &count, 1, static_cast<std::int32_t>(DataTypeOf<T>::value) | complex, HVD_HOST, 0, nullptr};
  }
  std::string text() const { return operation_text(kind_, name_); }

  hvd_operation operation_;
  const char* kind_;
  const std::string& name_;
  Site site_;
};

template <Element T>
Handle<void> allreduce(std::span<const T> input, std::span<T> output, const ReduceOptions& options, bool caller_waits,
                       Site site) {
  return Handle<void>(Call(HVD_ALLREDUCE, "allreduce", options, caller_waits, site).start(input, output));
}
template <Element T>
Handle<void> broadcast(std::span<T> data, int root_rank, const CollectiveOptions& options, bool caller_waits,
                       Site site) {
  Call call(HVD_BROADCAST, "broadcast", options.process_set, options.name, caller_waits, site);
  return Handle<void>(call.root(root_rank).start(std::span<const T>(data), data));
}
template <Element T>
Handle<Output<T>> allgather(std::span<const T> input, const CollectiveOptions& options, bool caller_waits, Site site) {
  Call call(HVD_ALLGATHER, "allgather", options.process_set, options.name, caller_waits, site);
  return Handle<Output<T>>(call.start(input));
}
template <Element T>
Handle<Output<T>> reducescatter(std::span<const T> input, const ReduceOptions& options, bool caller_waits, Site site) {
  return Handle<Output<T>>(Call(HVD_REDUCESCATTER, "reducescatter", options, caller_waits, site).start(input));
}
template <Element T>
Handle<Output<T>> alltoall(std::span<const T> input, const std::span<const std::int64_t>* splits,
                           const CollectiveOptions& options, bool caller_waits, Site site) {
  Call call(HVD_ALLTOALL, "alltoall", options.process_set, options.name, caller_waits, site);
  if (splits != nullptr) call.splits(*splits);
  return Handle<Output<T>>(call.start(input));
}

template <Elements R>
std::span<const ElementOf<R>> read(R& range) {
  return {std::ranges::data(range), std::ranges::size(range)};
}
template <MutableElements R>
std::span<ElementOf<R>> write(R& range) {
  return {std::ranges::data(range), std::ranges::size(range)};
}

}  // namespace detail

/// Reduces `data` over all ranks of the process set, in place. As many elements on all ranks.
template <MutableElements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<void> allreduce_async(R&& data, const ReduceOptions& options = {},
                                           std::source_location site = std::source_location::current()) {
  return detail::allreduce<detail::ElementOf<R>>(detail::write(data), detail::write(data), options, false, site);
}
/// Reduces `input` into `output`, which has as many elements.
template <Elements In, MutableElements Out>
  requires detail::Lasting<In> && detail::Lasting<Out> && std::same_as<detail::ElementOf<In>, detail::ElementOf<Out>>
[[nodiscard]] Handle<void> allreduce_async(In&& input, Out&& output, const ReduceOptions& options = {},
                                           std::source_location site = std::source_location::current()) {
  return detail::allreduce<detail::ElementOf<In>>(detail::read(input), detail::write(output), options, false, site);
}
/// Blocks; otherwise as allreduce_async.
template <MutableElements R>
void allreduce(R&& data, const ReduceOptions& options = {},
               std::source_location site = std::source_location::current()) {
  detail::allreduce<detail::ElementOf<R>>(detail::write(data), detail::write(data), options, true, site).wait();
}
template <Elements In, MutableElements Out>
  requires std::same_as<detail::ElementOf<In>, detail::ElementOf<Out>>
void allreduce(In&& input, Out&& output, const ReduceOptions& options = {},
               std::source_location site = std::source_location::current()) {
  detail::allreduce<detail::ElementOf<In>>(detail::read(input), detail::write(output), options, true, site).wait();
}
/// Reduces one number and returns the result. Blocks.
template <Element T>
[[nodiscard]] T allreduce(T value, const ReduceOptions& options = {},
                          std::source_location site = std::source_location::current()) {
  allreduce(std::span(&value, 1), options, site);
  return value;
}

/// Concatenates `input` of all ranks of the set, in the order of ranks. Sizes may differ between ranks.
template <Elements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<Output<detail::ElementOf<R>>> allgather_async(
    R&& input, const CollectiveOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::allgather(detail::read(input), options, false, site);
}
/// Blocks; otherwise as allgather_async.
template <Elements R>
[[nodiscard]] Output<detail::ElementOf<R>> allgather(R&& input, const CollectiveOptions& options = {},
                                                     std::source_location site = std::source_location::current()) {
  return detail::allgather(detail::read(input), options, true, site).wait();
}
/// Gathers one number of each rank. Blocks.
template <Element T>
[[nodiscard]] Output<T> allgather(T value, const CollectiveOptions& options = {},
                                  std::source_location site = std::source_location::current()) {
  return allgather(std::span(&value, 1), options, site);
}

/// Overwrites `data` with that of the *global* rank `root_rank`. As many elements on all ranks.
template <MutableElements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<void> broadcast_async(R&& data, int root_rank, const CollectiveOptions& options = {},
                                           std::source_location site = std::source_location::current()) {
  return detail::broadcast(detail::write(data), root_rank, options, false, site);
}
/// Blocks; otherwise as broadcast_async.
template <MutableElements R>
void broadcast(R&& data, int root_rank, const CollectiveOptions& options = {},
               std::source_location site = std::source_location::current()) {
  detail::broadcast(detail::write(data), root_rank, options, true, site).wait();
}
/// Returns the root's number. Blocks.
template <Element T>
[[nodiscard]] T broadcast(T value, int root_rank, const CollectiveOptions& options = {},
                          std::source_location site = std::source_location::current()) {
  broadcast(std::span(&value, 1), root_rank, options, site);
  return value;
}

/// Reduces `input`, of which each rank gets its share: size / ranks elements, the first size % ranks ranks one more.
template <Elements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<Output<detail::ElementOf<R>>> reducescatter_async(
    R&& input, const ReduceOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::reducescatter(detail::read(input), options, false, site);
}
/// Blocks; otherwise as reducescatter_async.
template <Elements R>
[[nodiscard]] Output<detail::ElementOf<R>> reducescatter(R&& input, const ReduceOptions& options = {},
                                                         std::source_location site = std::source_location::current()) {
  return detail::reducescatter(detail::read(input), options, true, site).wait();
}

/// Sends each rank of the set an equal share of `input`; the output has what all sent to this one, in the order of
/// ranks.
template <Elements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<Output<detail::ElementOf<R>>> alltoall_async(
    R&& input, const CollectiveOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::alltoall(detail::read(input), nullptr, options, false, site);
}
/// The same with `splits`: how many elements go to each rank of the set. They sum up to the size of `input`.
template <Elements R>
  requires detail::Lasting<R>
[[nodiscard]] Handle<Output<detail::ElementOf<R>>> alltoall_async(
    R&& input, std::span<const std::int64_t> splits, const CollectiveOptions& options = {},
    std::source_location site = std::source_location::current()) {
  return detail::alltoall(detail::read(input), &splits, options, false, site);
}
/// Block; otherwise as alltoall_async.
template <Elements R>
[[nodiscard]] Output<detail::ElementOf<R>> alltoall(R&& input, const CollectiveOptions& options = {},
                                                    std::source_location site = std::source_location::current()) {
  return detail::alltoall(detail::read(input), nullptr, options, true, site).wait();
}
template <Elements R>
[[nodiscard]] Output<detail::ElementOf<R>> alltoall(R&& input, std::span<const std::int64_t> splits,
                                                    const CollectiveOptions& options = {},
                                                    std::source_location site = std::source_location::current()) {
  return detail::alltoall(detail::read(input), &splits, options, true, site).wait();
}

/// Is done when all ranks of the set have called. Operations in flight need not be done then.
[[nodiscard]] inline Handle<void> barrier_async(const CollectiveOptions& options = {},
                                                std::source_location site = std::source_location::current()) {
  return Handle<void>(
      detail::Call(HVD_BARRIER, "barrier", options.process_set, options.name, /*caller_waits=*/false, site).start());
}
/// Blocks; otherwise as barrier_async.
inline void barrier(const CollectiveOptions& options = {},
                    std::source_location site = std::source_location::current()) {
  Handle<void>(
      detail::Call(HVD_BARRIER, "barrier", options.process_set, options.name, /*caller_waits=*/true, site).start())
      .wait();
}

/// This rank has no more data: it takes part in allreduces of the others with elements that change nothing, and in
/// barriers; any other operation of theirs ends with an error. Is done when all ranks of the job have joined, and then
/// gives the rank that did last. Until then this rank can start nothing more.
[[nodiscard]] inline Handle<int> join_async(std::source_location site = std::source_location::current()) {
  static const std::string kNoName;
  return Handle<int>(detail::Call(HVD_JOIN, "join", ProcessSet(), kNoName, /*caller_waits=*/false, site).start());
}
/// Blocks; otherwise as join_async.
inline int join(std::source_location site = std::source_location::current()) { return join_async(site).wait(); }

}  // namespace hvd
