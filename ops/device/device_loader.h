// Finds the module that can talk to an accelerator, and opens it. Any thread.
#pragma once

#include <optional>
#include <span>
#include <string>

#include <horovod_cpp/status.h>

#include "ops/device/device_runtime.h"

namespace hvd {

/// The file of libhvd_cuda.so, which lies in HOROVOD_MODULE_PATH or beside this library.
std::optional<std::string> device_module_file();

/// The runtime of this module; it stays for ever. The first call opens it and may take a second; its result, or its
/// failure, is the result of all. kUnavailable says in one line what is missing, where it was looked for, and what
/// works without it.
Result<DeviceRuntime*> load_device_runtime();

/// The same from the first of these files that exists, and not remembered.
Result<DeviceRuntime*> open_device_runtime(std::span<const std::string> module_files);

}  // namespace hvd
