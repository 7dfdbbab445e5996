#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

Status check(const Request& request, const Membership& /*membership*/) { return attributes::check_tensors(request); }

// Not found by `check`: a rank that is refused at once would leave the others waiting, who may have brought rows.
std::string_view refusal(const Request& agreed) {
  if (!attributes::has_scalar(agreed)) return {};
  return "a scalar cannot be gathered; give it one dimension, as in tensor.reshape(1)";
}

// Ranks may bring different numbers of rows: compared with what this rank brought last time.
Request as_rank_sent_it(const Request& agreed, const ResponseEntry& entry, int index) {
  Request request = agreed;
  const std::size_t ranks = entry.first_dims.size() / (1 + agreed.more.size());
  auto place = static_cast<std::size_t>(index);
  request.shape.front() = entry.first_dims[place];
  for (TensorType& tensor : request.more) tensor.shape.front() = entry.first_dims[place += ranks];
  return request;
}

bool repeats(const Request& request, const Request& agreed, const ResponseEntry& entry, int index) {
  return attributes::same_agreement(request, as_rank_sent_it(agreed, entry, index));
}

ResponseEntry entry(std::span<const Request* const> requests) {
  ResponseEntry made = attributes::entry_alike(requests);
  for (const Request* request : requests) made.first_dims.push_back(request->shape.front());
  for (std::size_t i = 0; i < made.more.size(); ++i) {
    for (const Request* request : requests) made.first_dims.push_back(request->more[i].shape.front());
  }
  return made;
}

}  // namespace

constinit const OpRule kAllgatherRule{
    OpKind::kAllgather,
    /*fusible=*/false,
    /*cacheable=*/true,
    /*groupable=*/true,
    /*runs_with_joined=*/false,
    /*any_order=*/false,        check, attributes::kRows, repeats, entry, as_rank_sent_it, refusal};

}  // namespace hvd
