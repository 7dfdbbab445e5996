#include "horovod_cpp/engine/op_rules/rules.h"

namespace hvd {
namespace {

constexpr std::array kAttributes{
    Attribute{"data type", attributes::dtype}, Attribute{"number of dimensions", attributes::dimensions},
    Attribute{"shape after the first dimension", attributes::trailing_shape}, Attribute{"memory", attributes::memory}};

Status check(const Request& request, const Membership& /*membership*/) {
  HVD_RETURN_IF_ERROR(attributes::check_tensor(request));
  if (request.shape.empty()) {
    return Status::invalid_argument("a scalar cannot be gathered; give it one dimension, as in tensor.reshape(1)");
  }
  return {};
}

// Ranks may bring different numbers of rows: compared with what this rank brought last time.
Request as_rank_sent_it(const Request& agreed, const ResponseEntry& entry, int index) {
  Request request = agreed;
  request.shape.front() = entry.first_dims[static_cast<std::size_t>(index)];
  return request;
}

bool repeats(const Request& request, const Request& agreed, const ResponseEntry& entry, int index) {
  return attributes::same_agreement(request, as_rank_sent_it(agreed, entry, index));
}

ResponseEntry entry(std::span<const Request* const> requests) {
  ResponseEntry made = attributes::entry_alike(requests);
  for (const Request* request : requests) made.first_dims.push_back(request->shape.front());
  return made;
}

}  // namespace

constinit const OpRule kAllgatherRule{
    OpKind::kAllgather, /*fusible=*/false, /*cacheable=*/true, check, kAttributes, repeats, entry, as_rank_sent_it};

}  // namespace hvd
