#include "ops/transport/shm/shm_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

namespace hvd {
namespace {

// Newer than the C library headers that we build with.
constexpr unsigned kNoExecSeal = 0x8;  // MFD_NOEXEC_SEAL, Linux 6.3
constexpr int kPopulateWrite = 23;     // MADV_POPULATE_WRITE, Linux 5.14

Status errno_status(const char* what, std::size_t bytes) {
  return Status::unavailable(
      fmt::format("{} for {} bytes of shared memory failed: {}", what, bytes, std::strerror(errno)));
}

// Some systems refuse memory files that could be executed; old kernels do not know the flag.
int open_memory_file(const char* name) {
  const int file = ::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExecSeal);
  return file >= 0 || errno != EINVAL ? file : ::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
}

// A peer that could shrink the file could end this process with SIGBUS.
bool is_sealed(int file) {
  const int seals = ::fcntl(file, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

// Pages are taken now, although many may never be used: a page that cannot be had later is a SIGBUS in the middle of
// training (strict overcommit), while now it only means that this pair of ranks uses another transport. Populating
// rather than fallocate, since only a page fault sees the advice for huge pages.
bool reserve(int file, void* address, std::size_t bytes) {
  if (::madvise(address, bytes, kPopulateWrite) == 0) return true;
  return errno == EINVAL && ::fallocate(file, 0, 0, static_cast<off_t>(bytes)) == 0;  // before Linux 5.14
}

}  // namespace

Result<UniqueFd> create_memory_file(const char* name, std::size_t bytes) {
  UniqueFd file(open_memory_file(name));
  if (!file) return errno_status("memfd_create", bytes);
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) return errno_status("ftruncate", bytes);
  if (::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return errno_status("sealing", bytes);
  }
  return file;
}

bool read_memory(pid_t pid, std::uint64_t address, std::span<std::byte> place) {
  const iovec here{place.data(), place.size()};
  const iovec there{reinterpret_cast<void*>(address), place.size()};
  return ::process_vm_readv(pid, &here, 1, &there, 1, 0) == static_cast<ssize_t>(place.size());
}

Result<SharedMapping> SharedMapping::map(int file, std::size_t bytes) {
  struct stat info{};
  if (::fstat(file, &info) != 0) return errno_status("fstat", bytes);
  if (static_cast<std::size_t>(info.st_size) != bytes || !is_sealed(file)) {
    return Status::unavailable(fmt::format("a shared memory file has {} bytes and {}; expected {} bytes and a seal",
                                           info.st_size, is_sealed(file) ? "a seal" : "no seal", bytes));
  }
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (address == MAP_FAILED) return errno_status("mmap", bytes);
  SharedMapping mapping({static_cast<std::byte*>(address), bytes});
  // A forked child must not write into the streams of its parent.
  if (::madvise(address, bytes, MADV_DONTFORK) != 0) return errno_status("madvise", bytes);
  ::madvise(address, bytes, MADV_HUGEPAGE);  // only where the system allows it; nothing depends on it
  if (!reserve(file, address, bytes)) return errno_status("reserving pages", bytes);
  return mapping;
}

SharedMapping::~SharedMapping() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
}

}  // namespace hvd
