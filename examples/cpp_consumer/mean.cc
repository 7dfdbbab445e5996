// Each rank has some numbers; all learn the mean of all of them.
#include <cstdio>
#include <numeric>
#include <vector>

#include <horovod_cpp/collectives.h>
#include <horovod_cpp/hvd.h>

int main() {
  const hvd::Session session;  // joins the job here, and leaves it at the end of main
  const std::vector<double> mine(3, hvd::rank());

  std::vector<double> sums{std::accumulate(mine.begin(), mine.end(), 0.0), double(mine.size())};
  hvd::Handle<void> handle = hvd::allreduce_async(sums, {.op = hvd::ReduceOp::kSum, .name = "sums"});
  const hvd::Output<int> ranks = hvd::allgather(hvd::rank());  // while that is in flight
  handle.wait();

  std::printf("rank %d of %zu: mean %g\n", hvd::rank(), ranks.size(), sums[0] / sums[1]);
}
