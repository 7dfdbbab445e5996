#include "common/env_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "common/fault.h"

namespace hvd {
namespace {

// A whole number within a range; the whole text has to be one.
struct Range {
  std::int64_t low;
  std::int64_t high;
};

Result<std::int64_t> parse_integer(std::string_view text, Range range, std::string_view unit) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < range.low || value > range.high) {
    return Status::invalid_argument(fmt::format("a whole number from {} to {} ({})", range.low, range.high, unit));
  }
  return value;
}

Result<double> parse_number(std::string_view text, double low, double high, std::string_view unit) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value) || value < low ||
      value > high) {
    return Status::invalid_argument(fmt::format("a number from {} to {} ({})", low, high, unit));
  }
  return value;
}

Result<std::size_t> parse_bytes(std::string_view text, std::int64_t low = 0) {
  Result<std::int64_t> value = parse_integer(text, {low, std::int64_t{1} << 40}, "bytes");
  if (!value) return value.status();
  return static_cast<std::size_t>(*value);
}

Result<int> parse_log_level(std::string_view text) {
  constexpr std::array<std::string_view, 6> names{"trace", "debug", "info", "warning", "error", "fatal"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto same = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; };
    if (std::equal(text.begin(), text.end(), names[i].begin(), names[i].end(), same)) return static_cast<int>(i);
  }
  return Status::invalid_argument(fmt::format("one of {}", fmt::join(names, ", ")));
}

template <typename T, typename U>
Status store(T& target, Result<U> parsed) {
  if (!parsed) return parsed.status();
  target = static_cast<T>(*parsed);
  return {};
}

Status store_seconds(std::chrono::seconds& target, std::string_view text) {
  Result<std::int64_t> value = parse_integer(text, {0, 30L * 86400}, "seconds");
  if (!value) return value.status();
  target = std::chrono::seconds(*value);
  return {};
}

Status store_milliseconds(std::chrono::microseconds& target, std::string_view text) {
  Result<double> value = parse_number(text, 0, 60'000, "milliseconds");
  if (!value) return value.status();
  target = std::chrono::microseconds(std::llround(*value * 1000));
  return {};
}

struct Row {
  Knob knob;
  Status (*read)(Options& options, std::string_view text);
  std::string (*show)(const Options& options);
};

template <std::size_t Options::* Field>
std::string show_bytes(const Options& options) {
  return fmt::format("{}", options.*Field);
}

std::string no_show(const Options& /*options*/) { return {}; }

constexpr std::array kRows{
    Row{{"HOROVOD_FUSION_THRESHOLD", "cap of one fused call, in bytes; 0 turns fusion off", true},
        [](Options& o, std::string_view t) { return store(o.fusion_threshold_bytes, parse_bytes(t)); },
        show_bytes<&Options::fusion_threshold_bytes>},
    Row{{"HOROVOD_FUSION_COPY_LIMIT", "a tensor above this many bytes is never copied to be fused", true},
        [](Options& o, std::string_view t) { return store(o.fusion_copy_limit_bytes, parse_bytes(t)); },
        show_bytes<&Options::fusion_copy_limit_bytes>},
    Row{{"HOROVOD_CYCLE_TIME", "longest time that a ready tensor waits for company, in milliseconds", false},
        [](Options& o, std::string_view t) { return store_milliseconds(o.cycle_time, t); },
        no_show},
    Row{{"HOROVOD_CACHE_CAPACITY", "names that the response cache remembers; 0 turns it off", true},
        [](Options& o, std::string_view t) { return store(o.cache_capacity, parse_integer(t, {0, 1 << 24}, "names")); },
        show_bytes<&Options::cache_capacity>},
    Row{{"HOROVOD_SMALL_LIMIT", "a tensor up to this many bytes is reduced by recursive doubling", true},
        [](Options& o, std::string_view t) { return store(o.small_limit_bytes, parse_bytes(t)); },
        show_bytes<&Options::small_limit_bytes>},
    Row{{"HOROVOD_STANDING_LIMIT",
         "a tensor up to this many bytes that ranks reduce again and again, alone, needs no negotiation; up to 64 KiB "
         "where "
         "ranks share no memory",
         false},
        [](Options& o, std::string_view t) { return store(o.standing_limit_bytes, parse_bytes(t)); },
        no_show},
    Row{{"HOROVOD_STANDING_AFTER", "from this many such calls in a row on; 0 turns it off", false},
        [](Options& o, std::string_view t) { return store(o.standing_after, parse_integer(t, {0, 1 << 20}, "calls")); },
        no_show},
    Row{{"HOROVOD_PULL_FROM_BYTES",
         "in a collective of so many bytes, ranks of a host read each other's memory where that is allowed; 0: never",
         true},
        [](Options& o, std::string_view t) { return store(o.pull_from_bytes, parse_bytes(t)); },
        show_bytes<&Options::pull_from_bytes>},
    Row{{"HOROVOD_SEGMENT_BYTES", "bytes of a chunk that are in flight at once", true},
        [](Options& o, std::string_view t) { return store(o.segment_bytes, parse_bytes(t, 64)); },
        show_bytes<&Options::segment_bytes>},
    Row{{"HOROVOD_SPIN_TIME", "how long a waiter looks for progress before it sleeps, in milliseconds", false},
        [](Options& o, std::string_view t) { return store_milliseconds(o.spin_time, t); },
        no_show},
    Row{{"HOROVOD_STALL_CHECK_TIME_SECONDS", "a tensor that waits longer is reported; 0 turns the check off", false},
        [](Options& o, std::string_view t) { return store_seconds(o.stall_check_time, t); },
        no_show},
    Row{{"HOROVOD_STALL_CHECK_DISABLE", "1 turns the stall check off", false},
        [](Options& o, std::string_view t) {
          Result<std::int64_t> off = parse_integer(t, {0, 1}, "0 or 1");
          if (!off) return off.status();
          if (*off == 1) o.stall_check_time = std::chrono::seconds(0);
          return Status();
        },
        no_show},
    Row{{"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "a tensor that waits longer ends with an error; 0: never", false},
        [](Options& o, std::string_view t) { return store_seconds(o.stall_shutdown_time, t); },
        no_show},
    Row{{"HOROVOD_START_TIMEOUT", "how long init waits for the other ranks, in seconds", false},
        [](Options& o, std::string_view t) { return store_seconds(o.start_timeout, t); },
        no_show},
    Row{{"HOROVOD_LOG_LEVEL", "trace, debug, info, warning, error or fatal", false},
        [](Options& o, std::string_view t) { return store(o.log_level, parse_log_level(t)); },
        no_show},
    Row{{"HOROVOD_LOG_HIDE_TIME", "1 leaves the time out of log lines", false},
        [](Options& o, std::string_view t) { return store(o.log_hide_time, parse_integer(t, {0, 1}, "0 or 1")); },
        no_show},
    Row{{"HOROVOD_DYNAMIC_PROCESS_SETS", "1 allows process sets to be added and removed after init", true},
        [](Options& o, std::string_view t) {
          return store(o.dynamic_process_sets, parse_integer(t, {0, 1}, "0 or 1"));
        },
        [](const Options& o) { return std::string(o.dynamic_process_sets ? "1" : "0"); }},
    Row{{"HOROVOD_TRANSPORT", "what carries bulk data: auto, shm, mpi or tcp", true},
        [](Options& o, std::string_view t) {
          if (t != "auto" && t != "shm" && t != "mpi" && t != "tcp") {
            return Status::invalid_argument("one of auto, shm, mpi, tcp");
          }
          o.transport = t;
          return Status();
        },
        [](const Options& o) { return o.transport; }},
    Row{{"HOROVOD_GPU_OPERATIONS", "what carries tensors in GPU memory: nccl, or host (copied through host memory)",
         true},
        [](Options& o, std::string_view t) {
          std::string value(t);
          std::transform(value.begin(), value.end(), value.begin(), [](unsigned char c) { return std::tolower(c); });
          if (value == "mpi") value = "host";  // Horovod's other value: what MPI, or another transport, carries
          if (value != "nccl" && value != "host") return Status::invalid_argument("one of nccl, host, mpi");
          o.gpu_operations = value;
          return Status();
        },
        [](const Options& o) { return o.gpu_operations; }},
    Row{{"HOROVOD_NCCL_REGISTERED_BYTES",
         "GPU memory of each process set that is registered with NCCL, for fused calls; 0: none", true},
        [](Options& o, std::string_view t) { return store(o.nccl_registered_bytes, parse_bytes(t)); },
        show_bytes<&Options::nccl_registered_bytes>},
    Row{{"HOROVOD_HIERARCHICAL_ALLREDUCE",
         "1: tensors in GPU memory are reduced by NCCL within each host, and through host memory between hosts", true},
        [](Options& o, std::string_view t) {
          return store(o.hierarchical_allreduce, parse_integer(t, {0, 1}, "0 or 1"));
        },
        [](const Options& o) { return std::string(o.hierarchical_allreduce ? "1" : "0"); }},
    Row{{"HOROVOD_TIMELINE", "file that rank 0 records a timeline in; with {rank} in it, one for each rank", false},
        [](Options& o, std::string_view t) {
          o.timeline = t;
          return Status();
        },
        no_show},
    Row{{"HOROVOD_TIMELINE_MARK_CYCLES", "1 marks in the timeline when new operations are taken up", false},
        [](Options& o, std::string_view t) {
          return store(o.timeline_mark_cycles, parse_integer(t, {0, 1}, "0 or 1"));
        },
        no_show},
    Row{{"HOROVOD_FAULT", "faults to inject, for tests: action@point#n[:rank=r],...", false},
        [](Options& o, std::string_view t) {
          // Read as a whole, whatever the rank: all ranks refuse it alike, before any of them connects.
          const Result<std::unique_ptr<FaultPlan>> plan = FaultPlan::parse(t, 0);
          if (!plan) return plan.status();
          o.fault = t;
          return Status();
        },
        no_show},
};

constexpr auto kKnobs = [] {
  std::array<Knob, kRows.size()> all{};
  for (std::size_t i = 0; i < kRows.size(); ++i) all[i] = kRows[i].knob;
  return all;
}();

}  // namespace

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

Result<Options> options_from_environment(std::span<const Setting> given) {
  Options options;
  const auto read = [&](const Row& row, const std::string& text) -> Status {
    const Status done = row.read(options, text);
    if (done.ok()) return {};
    return Status::invalid_argument(
        fmt::format("{}='{}' cannot be used: it has to be {}", row.knob.name, text, done.text()));
  };
  for (const Row& row : kRows) {
    const bool is_given =
        std::any_of(given.begin(), given.end(), [&](const Setting& setting) { return setting.name == row.knob.name; });
    const std::optional<std::string> text = environment(row.knob.name.data());
    if (text && !is_given) HVD_RETURN_IF_ERROR(read(row, *text));
  }
  for (const Setting& setting : given) {
    const auto row =
        std::find_if(kRows.begin(), kRows.end(), [&](const Row& one) { return one.knob.name == setting.name; });
    if (row == kRows.end()) {
      std::string known;
      for (const Row& one : kRows) known += fmt::format("{}{}", known.empty() ? "" : ", ", one.knob.name);
      return Status::invalid_argument(fmt::format("{} is no option; there are {}", setting.name, known));
    }
    HVD_RETURN_IF_ERROR(read(*row, setting.value));
  }
  return options;
}

std::vector<Setting> agreed_settings(const Options& options) {
  std::vector<Setting> settings;
  for (const Row& row : kRows) {
    if (row.knob.agreed) settings.push_back({std::string(row.knob.name), row.show(options)});
  }
  return settings;
}

std::span<const Knob> knobs() { return kKnobs; }

}  // namespace hvd
