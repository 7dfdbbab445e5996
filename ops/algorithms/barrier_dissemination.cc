#include "ops/algorithms/barrier_dissemination.h"

#include "ops/algorithms/ring_schedule.h"

namespace hvd {

Task<Status> dissemination_barrier(CollectiveContext& context) {
  const int rank = context.rank();
  const int size = context.size();
  for (int distance = 1; distance < size; distance *= 2) {
    Pending told = context.send((rank + distance) % size, {});  // NOLINT(misc-const-correctness): co_await changes it
    HVD_CO_RETURN_IF_ERROR(co_await context.receive(wrap(rank - distance, size), {}));
    HVD_CO_RETURN_IF_ERROR(co_await told);
  }
  co_return Status();
}

}  // namespace hvd
