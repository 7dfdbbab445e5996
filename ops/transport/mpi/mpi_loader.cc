#include "ops/transport/mpi/mpi_loader.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <filesystem>
#include <optional>

#include "common/env_options.h"
#include "common/module_search.h"

namespace hvd {
namespace {

namespace fs = std::filesystem;

constexpr std::array kSonames{"libmpi.so.40", "libmpi.so.12"};  // Open MPI 4 and 5; MPICH and its kin
constexpr const char* kModuleName = "libhvd_mpi.so";
constexpr const char* kUserVariable = "HOROVOD_MPI_LIBRARY";

// Open MPI opens plug-ins of its own that expect to find libmpi's symbols.
constexpr int kLibraryFlags = RTLD_NOW | RTLD_GLOBAL;

class LibrarySearch {
 public:
  explicit LibrarySearch(const MpiSearch& search) : search_(search) {}

  /// nullptr: nowhere.
  void* open() {
    if (void* loaded = already_loaded()) return loaded;
    if (!search_.chosen_by_user.empty()) return try_open(search_.chosen_by_user);
    for (const std::string& folder : search_.folders) {
      for (const std::string& soname : search_.sonames) {
        if (void* opened = try_open((fs::path(folder) / soname).string())) return opened;
      }
    }
    for (const std::string& soname : search_.sonames) {
      if (!search_.system) break;
      if (void* opened = try_open(soname)) return opened;
    }
    return nullptr;
  }

  Status failure() const {
    const std::string user = search_.chosen_by_user.empty() ? fmt::format("{} is not set", kUserVariable)
                                                            : fmt::format("{} names it", kUserVariable);
    return Status::unavailable(fmt::format(
        "MPI is not there: no library could be opened of [{}] ({}); get one with `apt-get install openmpi-bin "
        "libopenmpi3` or name yours in {}; without MPI, start the job with hvdrun, and tcp and shm carry the data",
        fmt::join(tried_, "; "), user, kUserVariable));
  }

 private:
  void* already_loaded() const {
    for (const std::string& soname : search_.sonames) {
      // Once more with RTLD_GLOBAL: mpi4py and others load it for themselves only.
      if (void* loaded = dlopen(soname.c_str(), kLibraryFlags | RTLD_NOLOAD)) return loaded;
    }
    return nullptr;
  }

  void* try_open(const std::string& file) {
    void* opened = dlopen(file.c_str(), kLibraryFlags);
    if (opened == nullptr) tried_.push_back(dl_error());  // names the file
    return opened;
  }

  const MpiSearch& search_;
  std::vector<std::string> tried_;
};

// The first existing file; the error lists all.
Result<std::string> find_module(const MpiSearch& search) {
  if (const auto file = first_existing(search.module_files)) return *file;
  return Status::unavailable(fmt::format(
      "this build of horovod_cpp has no MPI module: looked for [{}]; install an MPI with its headers (`apt-get install "
      "libopenmpi-dev openmpi-bin`) and build again with HVD_WITH_MPI=ON, or name its folder in {}; without it, start "
      "the job with hvdrun, and tcp and shm carry the data",
      fmt::join(search.module_files, ", "), kModuleVariable));
}

std::string version_of(void* library) {
  using GetVersion = int(char*, int*);  // the same in every MPI
  auto* get = reinterpret_cast<GetVersion*>(dlsym(library, "MPI_Get_library_version"));
  std::array<char, 16384> text{};  // more than any MPI_MAX_LIBRARY_VERSION_STRING
  int length = 0;
  return get != nullptr && get(text.data(), &length) == 0 ? std::string(text.data()) : std::string();
}

// A module is compiled for one family of MPI libraries. It must have been bound to the library that was opened, not to
// a second one that the dynamic loader found beside it.
Status check_module(const MpiApi& api, const std::string& file, void* library) {
  if (api.abi_version != kMpiAbiVersion || api.struct_bytes < sizeof(MpiApi)) {
    return Status::unavailable(
        fmt::format("{} is of another version of horovod_cpp (module interface {}, {} bytes; "
                    "expected {}, {} bytes); build or install both together",
                    file, api.abi_version, api.struct_bytes, kMpiAbiVersion, sizeof(MpiApi)));
  }
  std::array<char, 16384> text{};
  api.library_version(text.data(), text.size());
  const std::string wanted = version_of(library);
  if (wanted == text.data()) return {};
  return Status::unavailable(
      fmt::format("{} was built for another MPI than the one of this process: it uses '{}', the "
                  "process has '{}'; use one MPI for both, or build horovod_cpp with it",
                  file, text.data(), wanted));
}

bool says(void* scope, const char* function) {
  using Query = int(int*);  // the same in every MPI
  auto* query = reinterpret_cast<Query*>(dlsym(scope, function));
  int flag = 0;
  return query != nullptr && query(&flag) == 0 && flag != 0;
}

bool in_use(void* scope) { return says(scope, "MPI_Initialized") && !says(scope, "MPI_Finalized"); }

}  // namespace

MpiSearch default_mpi_search() {
  MpiSearch search;
  search.sonames.assign(kSonames.begin(), kSonames.end());
  search.chosen_by_user = environment(kUserVariable).value_or("");
  for (const fs::path& folder : environment_folders()) search.folders.push_back(folder.string());
  search.module_files = module_places(kModuleName);
  return search;
}

Result<const MpiApi*> load_mpi(const MpiSearch& search) {
  Result<std::string> file = find_module(search);
  if (!file) return file.status();
  LibrarySearch libraries(search);
  void* library = libraries.open();
  if (library == nullptr) return libraries.failure();
  void* module = dlopen(file->c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    return Status::unavailable(
        fmt::format("the MPI module cannot be opened: {}; the process has '{}': use the MPI that "
                    "horovod_cpp was built with, or build it with this one",
                    dl_error(), version_of(library)));
  }
  auto* function = reinterpret_cast<MpiApiFunction*>(dlsym(module, kMpiApiSymbol));
  if (function == nullptr) return Status::unavailable(fmt::format("{} is no MPI module: {}", *file, dl_error()));
  const MpiApi* api = function();
  HVD_RETURN_IF_ERROR(check_module(*api, *file, library));
  return api;
}

bool mpi_in_use() {
  if (in_use(RTLD_DEFAULT)) return true;
  for (const char* soname : kSonames) {
    if (void* loaded = dlopen(soname, RTLD_NOW | RTLD_NOLOAD)) {
      const bool used = in_use(loaded);
      dlclose(loaded);  // only takes back the reference of this dlopen
      if (used) return true;
    }
  }
  return false;
}

}  // namespace hvd
