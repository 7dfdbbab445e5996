#include "common/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <string>

namespace hvd::log {
namespace {

// The library's own logger, outside spdlog's registry, which belongs to the program.
spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    auto made = std::make_shared<spdlog::logger>("hvd", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("hvd [%l] %v");
    made->set_level(spdlog::level::warn);
    return made;
  }();
  return *instance;
}

spdlog::level::level_enum to_spdlog(Level level) { return static_cast<spdlog::level::level_enum>(level); }

}  // namespace

void configure(Level level, bool hide_time, int rank, int size) {
  const std::string tag = fmt::format("hvd rank {}/{} ", rank, size);
  logger().set_pattern(hide_time ? tag + "[%l] %v" : tag + "[%Y-%m-%d %H:%M:%S.%e %l] %v");
  logger().set_level(to_spdlog(level));
}

bool enabled(Level level) { return logger().should_log(to_spdlog(level)); }

void write(Level level, std::string_view line) {
  logger().log(to_spdlog(level), spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace hvd::log
