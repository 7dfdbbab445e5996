// Turns what all ranks of a set have asked for into a response: an execution, or the error that they all get.
// Pure; any thread.
#pragma once

#include <functional>
#include <string>

#include "horovod_cpp/engine/readiness_table.h"
#include "horovod_cpp/engine/response_cache.h"

namespace hvd {

/// "train.py:88" for a call site of a global rank; empty when it is not known.
using CallSiteText = std::function<std::string(int rank, std::uint32_t call_site)>;

struct Agreement {
  Response response;     ///< with one entry
  Request agreed;        ///< as the first rank of the set sent it
  CacheId repeated = 0;  ///< not 0: all ranks sent this id, so nothing had to be compared
};

/// `pending` is ready. A disagreement becomes an error response that names operation, tensor, and for every attribute
/// in which ranks differ each value with its ranks and call sites.
Agreement agree(const OperationKey& key, const ReadinessTable::Pending& pending, const ResponseCache& cache,
                const CallSiteText& call_site);

/// An error for `key` alone.
Response error_response(const OperationKey& key, StatusCode code, std::string text);

}  // namespace hvd
