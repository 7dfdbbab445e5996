#include "horovod_cpp/engine/reordering.h"

#include <fmt/format.h>

#include <utility>

#include "ops/reorder.h"

namespace hvd {

Result<TensorEntry::Memory> Reordering::begin(CollectiveContext& context, TensorType type, TensorEntry::Memory own,
                                              bool is_read) {
  const std::size_t bytes = bytes_of(type.dtype, type.shape);
  std::byte* const copy = context.lease(bytes);
  if (copy == nullptr) return Status::internal(fmt::format("no memory for {} bytes in another order", bytes));
  if (is_read) {
    const Activity packing(context.activities(), ActivityKind::kPack);
    copy_to_c_order(own.input, type.order, copy, type.shape, size_of(type.dtype));
  }
  bytes_ += bytes;
  lent_.push_back({std::move(type), own.output, copy});
  return TensorEntry::Memory{copy, copy};
}

void Reordering::end(CollectiveContext& context) {
  if (lent_.empty()) return;
  const Activity unpacking(context.activities(), ActivityKind::kUnpack);
  for (const Lent& one : lent_) {
    copy_from_c_order(one.copy, one.output, one.type.order, one.type.shape, size_of(one.type.dtype));
  }
}

}  // namespace hvd
