// Grouped collectives on host memory: several ranges that are one operation, with one name, agreed and done for all of
// them or for none. Otherwise as collectives.h says.
//
// A group is a range of ranges of one type of elements: a std::vector<std::vector<float>>, a std::array of spans. The
// ranges may differ in size. All ranks give as many of them, in the same order.
#pragma once

#include <cstddef>
#include <iterator>
#include <ranges>
#include <source_location>
#include <span>
#include <utility>
#include <vector>

#include <horovod_cpp/collectives.h>

namespace hvd {

/// The outputs of a group, which the library made: dense elements in host memory, which live as long as this object.
/// Move-only.
template <Element T>
class GroupOutput {
 public:
  explicit GroupOutput(detail::Operation operation) : operation_(std::move(operation)) {
    for (int index = 0; index < operation_.tensors(); ++index) {
      const hvd_output output = operation_.output(index);
      parts_.emplace_back(static_cast<T*>(output.data), static_cast<std::size_t>(output.bytes) / sizeof(T));
    }
  }

  std::size_t size() const { return parts_.size(); }  ///< number of ranges
  std::span<T> operator[](std::size_t index) const { return parts_[index]; }
  auto begin() const { return parts_.begin(); }
  auto end() const { return parts_.end(); }

 private:
  detail::Operation operation_;
  std::vector<std::span<T>> parts_;
};

namespace detail {

template <typename R>
using PartOf = std::ranges::range_reference_t<R>;

/// Elements of the ranges of a group.
template <typename R>
using GroupElementOf = ElementOf<std::remove_reference_t<PartOf<R>>>;

/// A group that may be used while its handle lives: the memory that it names is not its own, or it is a named one.
template <typename R>
concept LastingGroup = Lasting<PartOf<R>> && (Lasting<R> || std::ranges::view<std::ranges::range_value_t<R>>);

template <typename T, typename R>
std::vector<std::span<T>> spans(R& group) {
  std::vector<std::span<T>> parts;
  for (auto&& part : group) parts.emplace_back(std::ranges::data(part), std::ranges::size(part));
  return parts;
}

}  // namespace detail

/// A range of ranges of elements.
template <typename R>
concept Group = std::ranges::input_range<R> && Elements<detail::PartOf<R>>;
/// The same, of elements that may be written to.
template <typename R>
concept MutableGroup = Group<R> && MutableElements<detail::PartOf<R>>;

namespace detail {

template <MutableGroup R>
Handle<void> grouped_allreduce(R& group, const ReduceOptions& options, bool caller_waits, Site site) {
  Call call(HVD_ALLREDUCE, "grouped allreduce", options, caller_waits, site);
  const auto parts = spans<GroupElementOf<R>>(group);
  return Handle<void>(call.start_group(std::span(parts), /*into_inputs=*/true));
}
template <Group R>
auto grouped_allgather(R& group, const CollectiveOptions& options, bool caller_waits, Site site) {
  Call call(HVD_ALLGATHER, "grouped allgather", options.process_set, options.name, caller_waits, site);
  const auto parts = spans<const GroupElementOf<R>>(group);
  return Handle<GroupOutput<GroupElementOf<R>>>(call.start_group(std::span(parts), /*into_inputs=*/false));
}
template <Group R>
auto grouped_reducescatter(R& group, const ReduceOptions& options, bool caller_waits, Site site) {
  Call call(HVD_REDUCESCATTER, "grouped reducescatter", options, caller_waits, site);
  const auto parts = spans<const GroupElementOf<R>>(group);
  return Handle<GroupOutput<GroupElementOf<R>>>(call.start_group(std::span(parts), /*into_inputs=*/false));
}

}  // namespace detail

/// Reduces each range of `group` over all ranks of the process set, in place. As many elements on all ranks.
template <MutableGroup R>
  requires detail::LastingGroup<R>
[[nodiscard]] Handle<void> grouped_allreduce_async(R&& group, const ReduceOptions& options = {},
                                                   std::source_location site = std::source_location::current()) {
  return detail::grouped_allreduce(group, options, /*caller_waits=*/false, site);
}
/// Blocks; otherwise as grouped_allreduce_async.
template <MutableGroup R>
void grouped_allreduce(R&& group, const ReduceOptions& options = {},
                       std::source_location site = std::source_location::current()) {
  detail::grouped_allreduce(group, options, /*caller_waits=*/true, site).wait();
}

/// Concatenates each range of `group` over all ranks of the set, in the order of ranks. Sizes may differ between ranks.
template <Group R>
  requires detail::LastingGroup<R>
[[nodiscard]] Handle<GroupOutput<detail::GroupElementOf<R>>> grouped_allgather_async(
    R&& group, const CollectiveOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::grouped_allgather(group, options, /*caller_waits=*/false, site);
}
/// Blocks; otherwise as grouped_allgather_async.
template <Group R>
[[nodiscard]] GroupOutput<detail::GroupElementOf<R>> grouped_allgather(
    R&& group, const CollectiveOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::grouped_allgather(group, options, /*caller_waits=*/true, site).wait();
}

/// Reduces each range of `group`, of which each rank gets its share, as reducescatter_async gives it.
template <Group R>
  requires detail::LastingGroup<R>
[[nodiscard]] Handle<GroupOutput<detail::GroupElementOf<R>>> grouped_reducescatter_async(
    R&& group, const ReduceOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::grouped_reducescatter(group, options, /*caller_waits=*/false, site);
}
/// Blocks; otherwise as grouped_reducescatter_async.
template <Group R>
[[nodiscard]] GroupOutput<detail::GroupElementOf<R>> grouped_reducescatter(
    R&& group, const ReduceOptions& options = {}, std::source_location site = std::source_location::current()) {
  return detail::grouped_reducescatter(group, options, /*caller_waits=*/true, site).wait();
}

}  // namespace hvd
