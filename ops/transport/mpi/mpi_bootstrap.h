// How the ranks of an MPI job meet: rank 0 collects, then all get everything. Nothing blocks inside MPI, so a rank that
// does not come ends in a deadline with its name.
// Used by the thread that runs init.
#pragma once

#include <memory>

#include "ops/transport/bootstrap.h"
#include "ops/transport/mpi/mpi_process.h"

namespace hvd {

class MpiBootstrap final : public Bootstrap {
 public:
  explicit MpiBootstrap(MpiProcess& process) : process_(process) {}

  std::string_view name() const override { return "mpi"; }
  int rank() const override { return process_.rank; }
  int size() const override { return process_.size; }
  /// 2(size-1) small messages to rank 0, two broadcasts. At most 16 MiB a rank, 2 GiB in all. Rank 0 names the ranks
  /// that have not come; the others cannot know them.
  Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine, TimePoint deadline) override;

 private:
  struct Meeting;
  Status meet(Meeting& meeting);
  Status make_endpoint(const Meeting& meeting);
  Status collect(Meeting& meeting);
  Status contribute(Meeting& meeting);
  Status broadcast(Meeting& meeting, std::span<std::byte> bytes, const Status& late);
  Status ended(int error) const;

  MpiProcess& process_;
};

}  // namespace hvd
