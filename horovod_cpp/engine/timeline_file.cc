#include "horovod_cpp/engine/timeline_file.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace hvd::timeline {
namespace {

constexpr std::string_view kStart = "[";
constexpr std::string_view kEnd = "\n]\n";

Status failure(const std::string& path, int error) {
  return Status::invalid_argument(
      fmt::format("the timeline cannot be written to '{}': {}", path, std::generic_category().message(error)));
}

}  // namespace

Result<File> File::create(const std::string& path) {
  // Without O_NONBLOCK a pipe that nobody reads would block here.
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666));
  if (!fd) return failure(path, errno);
  File file(path, std::move(fd));
  HVD_RETURN_IF_ERROR(file.write_at(0, std::string(kStart).append(kEnd)));
  file.end_ = static_cast<::off_t>(kStart.size());
  return file;
}

Status File::append(std::string_view elements) {
  std::string text = empty_ ? "\n" : ",\n";
  text.append(elements).append(kEnd);
  Status written = write_at(end_, text);
  if (!written.ok()) {
    // The old end needs no new block on the disk.
    if (::ftruncate(fd_.get(), end_) == 0) (void)write_at(end_, kEnd);
    return written;
  }
  end_ += static_cast<::off_t>(text.size() - kEnd.size());
  empty_ = false;
  return {};
}

Status File::write_at(::off_t place, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::pwrite(fd_.get(), text.data(), text.size(), place);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return failure(path_, errno);
    text.remove_prefix(static_cast<std::size_t>(written));
    place += written;
  }
  return {};
}

}  // namespace hvd::timeline
