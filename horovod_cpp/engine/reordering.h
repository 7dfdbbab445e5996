// Tensors that ranks lay out differently in memory: the call takes them in C order, and a rank whose own order is
// another lends it copies. One object per call. Runs under the Turn.
#pragma once

#include <vector>

#include "horovod_cpp/engine/tensor_queue.h"
#include "ops/collective_context.h"

namespace hvd {

class Reordering {
 public:
  /// Memory in C order for a tensor of `type` that lies in `own`, as long as the call; `is_read`: with its values.
  Result<TensorEntry::Memory> begin(CollectiveContext& context, TensorType type, TensorEntry::Memory own, bool is_read);
  /// The results are there: each goes to where its tensor lies.
  void end(CollectiveContext& context);

  /// Of all tensors that had to be copied.
  std::size_t bytes() const { return bytes_; }

 private:
  struct Lent {
    TensorType type;
    std::byte* output;
    const std::byte* copy;
  };
  std::vector<Lent> lent_;
  std::size_t bytes_ = 0;
};

}  // namespace hvd
