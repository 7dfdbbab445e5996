// The log: one line to stderr, tagged with the rank. The only file that sees spdlog is log.cc.
// Any thread; never under a lock.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string_view>
#include <utility>

namespace hvd::log {

enum class Level : std::uint8_t { kTrace, kDebug, kInfo, kWarning, kError, kFatal };

/// Sets what is shown (HOROVOD_LOG_LEVEL, HOROVOD_LOG_HIDE_TIME) and the tag of each line.
void configure(Level level, bool hide_time, int rank, int size);
bool enabled(Level level);
void write(Level level, std::string_view line);

template <typename... Args>
void line(Level level, fmt::format_string<Args...> format, Args&&... args) {
  if (enabled(level)) write(level, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  line(Level::kDebug, format, std::forward<Args>(args)...);
}
template <typename... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  line(Level::kInfo, format, std::forward<Args>(args)...);
}
template <typename... Args>
void warning(fmt::format_string<Args...> format, Args&&... args) {
  line(Level::kWarning, format, std::forward<Args>(args)...);
}
template <typename... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  line(Level::kError, format, std::forward<Args>(args)...);
}

}  // namespace hvd::log
