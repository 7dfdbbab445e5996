#include "common/module_search.h"

#include <dlfcn.h>

#include "common/env_options.h"

namespace hvd {

namespace fs = std::filesystem;

fs::path own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code error;
  const fs::path file = fs::canonical(info.dli_fname, error);
  return error ? fs::path() : file.parent_path();
}

std::vector<std::string> module_places(std::string_view file_name) {
  std::vector<std::string> places;
  if (const auto folder = environment(kModuleVariable)) places.push_back((fs::path(*folder) / file_name).string());
  if (const fs::path own = own_folder(); !own.empty()) places.push_back((own / file_name).string());
  return places;
}

std::vector<fs::path> environment_folders() {
  std::vector<fs::path> folders;
  for (fs::path at = own_folder(); at.has_relative_path(); at = at.parent_path()) {
    if (at.filename() != "site-packages") continue;  // .../lib/python3.x/site-packages/...
    folders.push_back(at.parent_path().parent_path());
    break;
  }
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const auto prefix = environment(variable)) folders.push_back(fs::path(*prefix) / "lib");
  }
  return folders;
}

std::optional<std::string> first_existing(std::span<const std::string> files) {
  std::error_code ignored;
  for (const std::string& file : files) {
    if (fs::exists(file, ignored)) return file;
  }
  return std::nullopt;
}

std::string dl_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "no reason given";
}

}  // namespace hvd
