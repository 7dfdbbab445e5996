// Memory that processes of one host share: an anonymous file and its mappings. Nothing has a name, so nothing is left
// behind however a process ends. Each object has one owner; any thread.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <horovod_cpp/status.h>

#include "common/unique_fd.h"

namespace hvd {

/// A new file of `bytes` zeros that can neither shrink nor grow; `name` shows in /proc/<pid>/maps.
/// kUnavailable when descriptors have run out or the size is refused.
Result<UniqueFd> create_memory_file(const char* name, std::size_t bytes);

/// Copies all that lies at `address` in the memory of process `pid`; false when that is not to be read from here.
bool read_memory(pid_t pid, std::uint64_t address, std::span<std::byte> place);

/// A file of `create_memory_file`, mapped. A child of fork does not get the mapping.
class SharedMapping {
 public:
  /// Maps all of `file` with its pages in place, so that touching them never fails later.
  /// kUnavailable when memory is short or `file` is not a sealed file of `bytes` bytes.
  static Result<SharedMapping> map(int file, std::size_t bytes);

  SharedMapping() = default;
  SharedMapping(SharedMapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  SharedMapping& operator=(SharedMapping&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMapping();

  std::span<std::byte> bytes() const { return bytes_; }

 private:
  explicit SharedMapping(std::span<std::byte> bytes) : bytes_(bytes) {}

  std::span<std::byte> bytes_;
};

}  // namespace hvd
