// The part of the C ABI that tells what this build has and what it finds on this machine.
// Any thread; a question may block while a library is opened.

#include <horovod_cpp/c_api.h>

#include <fmt/format.h>

#include <string>

#include "horovod_cpp/engine/c_api_errors.h"
#include "ops/device/device_loader.h"
#include "ops/nccl/nccl_loader.h"
#include "ops/transport/mpi/mpi_loader.h"

namespace {

using hvd::Result;
using hvd::Status;
using hvd::c_api::guarded;

Result<std::string> describe_mpi() {
  Result<const hvd::MpiApi*> api = hvd::load_mpi(hvd::default_mpi_search());
  if (!api) return api.status();
  std::string text(16384, '\0');  // more than any MPI_MAX_LIBRARY_VERSION_STRING
  api.value()->library_version(text.data(), text.size());
  text.resize(text.find('\0'));
  return text;
}

Result<std::string> describe_cuda() {
  Result<hvd::DeviceRuntime*> runtime = hvd::load_device_runtime();
  if (!runtime) return runtime.status();
  return runtime.value()->description();
}

Result<std::string> describe_nccl() {
  Result<const hvd::NcclLibrary*> library = hvd::load_nccl();
  if (!library) return library.status();
  const hvd::NcclLibrary& found = *library.value();
  std::string text = fmt::format("{}, {}", hvd::nccl_version_text(found.version), found.file);
  for (const hvd::nccl::Feature& feature : hvd::nccl_features(found)) {
    text += fmt::format(", {} {}", feature.there ? "with" : "without", feature.name);
  }
  return text;
}

// What is handed out lives as long as the process.
Status hand_out(const Result<std::string>& known, const char** text) {
  if (!known) return known.status();
  *text = known.value().c_str();
  return {};
}

}  // namespace

extern "C" {

int hvd_mpi_built(void) { return HVD_MPI_BUILT; }

int hvd_mpi_text(const char** text) {
  return guarded([&] {
    static const Result<std::string> known = describe_mpi();
    return hand_out(known, text);
  });
}

int hvd_cuda_built(void) { return hvd::device_module_file() ? 1 : 0; }

int hvd_cuda_devices(int32_t* count) {
  return guarded([&]() -> Status {
    Result<hvd::DeviceRuntime*> runtime = hvd::load_device_runtime();
    if (!runtime) return runtime.status();
    *count = runtime.value()->device_count();
    return {};
  });
}

int hvd_cuda_device_of(const void* data, int32_t* device) {
  return guarded([&]() -> Status {
    Result<hvd::DeviceRuntime*> runtime = hvd::load_device_runtime();
    if (!runtime) return runtime.status();
    Result<int> found = runtime.value()->device_of(data);
    if (!found) return found.status();
    *device = *found;
    return {};
  });
}

int hvd_cuda_text(const char** text) {
  return guarded([&] {
    static const Result<std::string> known = describe_cuda();
    return hand_out(known, text);
  });
}

int hvd_nccl_version(int32_t* version) {
  return guarded([&]() -> Status {
    Result<const hvd::NcclLibrary*> library = hvd::load_nccl();
    if (!library) return library.status();
    *version = library.value()->version;
    return {};
  });
}

int hvd_nccl_text(const char** text) {
  return guarded([&] {
    static const Result<std::string> known = describe_nccl();
    return hand_out(known, text);
  });
}

}  // extern "C"
