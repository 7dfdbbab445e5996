// How the ranks of an MPI job meet: rank 0 collects, then all get everything. Nothing blocks inside MPI, so a rank that
// does not come ends in a deadline with its name.
// Used by the thread that runs init.
#pragma once

#include <memory>
#include <vector>

#include "ops/transport/bootstrap.h"
#include "ops/transport/mpi/mpi_process.h"

namespace hvd {

class MpiBootstrap final : public Bootstrap {
 public:
  /// `members`: ranks of MPI_COMM_WORLD, this one among them, which alone meet, numbered in this order; empty: all.
  MpiBootstrap(MpiProcess& process, std::vector<int> members);

  std::string_view name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  /// 2(size-1) small messages to rank 0, two broadcasts. At most 16 MiB a rank, 2 GiB in all. Rank 0 names the ranks
  /// that have not come; the others cannot know them. The first one in a process waits for all of MPI_COMM_WORLD, also
  /// with `members`.
  Result<std::vector<std::vector<std::byte>>> allgather(std::span<const std::byte> mine, TimePoint deadline) override;
  /// For a rank that meets nobody: without it the others get no communicator, and MPI no orderly end.
  Status take_part_in_communicator(TimePoint deadline);

 private:
  struct Meeting;
  Status meet(Meeting& meeting);
  Status make_endpoint(const Meeting& meeting);
  Status collect(Meeting& meeting);
  Status contribute(Meeting& meeting);
  Status broadcast(Meeting& meeting, std::span<std::byte> bytes, const Status& late);
  Status distribute(Meeting& meeting, std::span<std::byte> bytes, const Status& late);
  Status ended(int error) const;
  // The rank in MPI_COMM_WORLD.
  int place(std::size_t rank) const { return members_.empty() ? static_cast<int>(rank) : members_[rank]; }

  MpiProcess& process_;
  std::vector<int> members_;
  int rank_;
  int size_;
};

}  // namespace hvd
