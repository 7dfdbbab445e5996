#include "ops/nccl/nccl_loader.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <system_error>

#include "common/env_options.h"
#include "common/module_search.h"

namespace hvd {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSoname = "libnccl.so.2";
constexpr const char* kUserVariable = "HOROVOD_NCCL_LIBRARY";
constexpr int kOldest = 21801;
constexpr int kAbortsEnd = 22602;  // an abort of 2.25 may hang when a rank is lost
constexpr int kFlags = RTLD_NOW | RTLD_LOCAL;

// Where NCCL's wheel has it in the environments that this process may be in.
std::vector<std::string> wheel_files() {
  std::vector<std::string> files;
  std::error_code ignored;
  for (const fs::path& folder : environment_folders()) {
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
      if (!entry.path().filename().string().starts_with("python")) continue;
      files.push_back((entry.path() / "site-packages" / "nvidia" / "nccl" / "lib" / kSoname).string());
    }
  }
  return files;
}

class Search {
 public:
  void* open() {
    // A framework's: two of them in one process would not know of each other.
    if (void* loaded = dlopen(kSoname, kFlags | RTLD_NOLOAD)) return loaded;
    if (const auto chosen = environment(kUserVariable)) return try_open(*chosen);
    std::error_code ignored;
    for (const std::string& file : wheel_files()) {
      if (!fs::exists(file, ignored)) {
        tried_.push_back(file + ": no such file");
      } else if (void* opened = try_open(file)) {
        return opened;
      }
    }
    return try_open(kSoname);
  }

  Status failure() const {
    return Status::unavailable(
        fmt::format("NCCL is not there: no library could be opened of [{}]; get one with `pip install "
                    "nvidia-nccl-cu13` or name yours "
                    "in {}; without it, HOROVOD_GPU_OPERATIONS=host carries device memory through the host",
                    fmt::join(tried_, "; "), kUserVariable));
  }

 private:
  void* try_open(const std::string& file) {
    void* opened = dlopen(file.c_str(), kFlags);
    if (opened == nullptr) tried_.push_back(dl_error());  // names the file
    return opened;
  }

  std::vector<std::string> tried_;
};

// Takes calls out of a library, and remembers what it lacks.
class Symbols {
 public:
  explicit Symbols(void* library) : library_(library) {}

  template <typename Function>
  void take(const char* name, Function*& place) {
    take_if_there(name, place);
    if (place == nullptr) missing_.emplace_back(name);
  }
  template <typename Function>
  void take_if_there(const char* name, Function*& place) {
    place = reinterpret_cast<Function*>(dlsym(library_, name));
  }
  const std::vector<std::string>& missing() const { return missing_; }

 private:
  void* library_;
  std::vector<std::string> missing_;
};

std::string file_of(const void* function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : kSoname;
}

Result<NcclLibrary> open_nccl() {
  Search search;
  void* library = search.open();
  if (library == nullptr) return search.failure();
  NcclLibrary found;
  nccl::Api& api = found.api;
  Symbols symbols(library);
  symbols.take("ncclGetVersion", api.get_version);
  symbols.take("ncclGetUniqueId", api.get_unique_id);
  symbols.take("ncclCommInitRankConfig", api.comm_init_rank_config);
  symbols.take("ncclCommGetAsyncError", api.comm_get_async_error);
  symbols.take("ncclCommFinalize", api.comm_finalize);
  symbols.take("ncclCommDestroy", api.comm_destroy);
  symbols.take("ncclCommAbort", api.comm_abort);
  symbols.take("ncclGetLastError", api.get_last_error);
  symbols.take("ncclGetErrorString", api.get_error_string);
  symbols.take("ncclGroupStart", api.group_start);
  symbols.take("ncclGroupEnd", api.group_end);
  symbols.take("ncclAllReduce", api.all_reduce);
  symbols.take("ncclAllGather", api.all_gather);
  symbols.take("ncclReduceScatter", api.reduce_scatter);
  symbols.take("ncclBroadcast", api.broadcast);
  symbols.take("ncclReduce", api.reduce);
  symbols.take("ncclSend", api.send);
  symbols.take("ncclRecv", api.receive);
  symbols.take_if_there("ncclMemAlloc", api.mem_alloc);
  symbols.take_if_there("ncclMemFree", api.mem_free);
  symbols.take_if_there("ncclCommRegister", api.comm_register);
  symbols.take_if_there("ncclCommDeregister", api.comm_deregister);
  if (api.get_version != nullptr) {
    api.get_version(&found.version);
    found.file = file_of(reinterpret_cast<const void*>(api.get_version));
  }
  if (!symbols.missing().empty() || found.version < kOldest) {
    return Status::unavailable(
        fmt::format("NCCL {} ({}) is too old: 2.18 is the oldest that works{}{}", nccl_version_text(found.version),
                    found.file, symbols.missing().empty() ? "" : "; it lacks ", fmt::join(symbols.missing(), ", ")));
  }
  return found;
}

}  // namespace

Result<const NcclLibrary*> load_nccl() {
  static const Result<NcclLibrary> loaded = open_nccl();
  if (!loaded) return loaded.status();
  return &loaded.value();
}

std::vector<nccl::Feature> nccl_features(const NcclLibrary& library) {
  return {{"ncclMemAlloc", library.api.mem_alloc != nullptr},
          {"ncclCommRegister", library.api.comm_register != nullptr},
          {"aborts that always end", library.version >= kAbortsEnd}};
}

std::string nccl_version_text(int version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace hvd
