// Finds NCCL in this process or on this machine: the one that a framework has loaded, then the one that
// HOROVOD_NCCL_LIBRARY names, then the wheels of this Python environment, then the system's.
// Any thread.
#pragma once

#include <string>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/nccl/nccl_api.h"

namespace hvd {

struct NcclLibrary {
  nccl::Api api;
  int version = 0;   ///< as ncclGetVersion: 22809 is 2.28.9
  std::string file;  ///< where it was found
};

/// kUnavailable: where it was looked for, how to get it, what works without it; or that it is too old. The first answer
/// stays for the life of the process.
Result<const NcclLibrary*> load_nccl();

/// What not every NCCL has, and whether this one does.
std::vector<nccl::Feature> nccl_features(const NcclLibrary& library);
std::string nccl_version_text(int version);

}  // namespace hvd
