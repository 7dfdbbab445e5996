// Which parameters are frozen on all ranks, so that nothing is reduced for them. As horovod_cpp/torch/freezing.py has
// it, which says how ranks agree: ranks of both kinds meet in one job. The thread that calls the optimizer.
#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include <horovod_cpp/torch.h>
#include <horovod_cpp/torch/collectives.h>

namespace hvd::torch::detail {

struct Gradient;

/// Whether a parameter requires no gradient and has none.
bool is_still(const at::Tensor& parameter);

/// Whether a reduction failed, with this error, as another rank asks. No gradient is of bytes.
bool another_asks(const std::exception& error);

inline constexpr const char* kOutOfTurn = "a rank has asked out of turn which parameters are frozen";

/// Whether the parameters of one reduction are still on all ranks.
class Question {
 public:
  /// `is_sparse`: its gradients are gathered.
  Question(std::vector<Gradient*> members, std::string name, bool is_sparse)
      : members_(std::move(members)), name_(std::move(name)), is_sparse_(is_sparse) {}

  const std::vector<Gradient*>& members() const { return members_; }
  /// Tells the others what is still here. Does not block.
  void ask(ProcessSet process_set, Site site);
  /// Blocks until the others have told theirs: false where one of them reduces.
  bool is_answered(Site site);
  bool all_at_rest() const;

 private:
  std::vector<Gradient*> members_;
  std::string name_;
  bool is_sparse_;
  Handle handle_;
};

/// Blocks until all are answered: the questions that were asked, and those in place of which this rank reduced. Gives
/// both.
std::vector<Question> settle(std::vector<Question> asked, std::vector<Question> refused, ProcessSet process_set,
                             Site site);

}  // namespace hvd::torch::detail
