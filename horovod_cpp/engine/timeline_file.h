// A file with a JSON array that is whole after every write, so that whoever ends the process leaves one that can be
// read. One thread at a time.
#pragma once

#include <sys/types.h>

#include <string>
#include <string_view>

#include <horovod_cpp/status.h>

#include "common/unique_fd.h"

namespace hvd::timeline {

class File {
 public:
  /// Creates the file, or empties it, and writes an empty array. kInvalidArgument with path and reason if that fails.
  static Result<File> create(const std::string& path);

  const std::string& path() const { return path_; }
  /// Adds elements to the array, as text, with a comma between two. A failure leaves the array as it was.
  Status append(std::string_view elements);

 private:
  File(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
  Status write_at(::off_t place, std::string_view text);

  std::string path_;
  UniqueFd fd_;
  ::off_t end_ = 0;  // of the last element: the closing bracket comes there
  bool empty_ = true;
};

}  // namespace hvd::timeline
