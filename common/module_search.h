// Where the modules of this library lie: shared objects that it opens with dlopen when a job needs them.
// Pure but for the environment and the file system; any thread.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hvd {

/// Names a folder that is looked into first.
inline constexpr const char* kModuleVariable = "HOROVOD_MODULE_PATH";

/// The folder of the shared library (or program) that this code is part of; empty where the system does not say.
std::filesystem::path own_folder();

/// The places of a module in the order in which they are tried: the folder that kModuleVariable names, then our own.
std::vector<std::string> module_places(std::string_view file_name);

/// The lib folders (<prefix>/lib) of the Python environments that this process may belong to: the one that this library
/// is installed in, then those that VIRTUAL_ENV and CONDA_PREFIX name.
std::vector<std::filesystem::path> environment_folders();

std::optional<std::string> first_existing(std::span<const std::string> files);

/// Why the last dlopen or dlsym of this thread failed.
std::string dl_error();

}  // namespace hvd
