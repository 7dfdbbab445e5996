// The simulator's command line: runs a range of seeds and stops at the first broken invariant (docs/simulator.md).

#include <fmt/format.h>

#include <unistd.h>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "common/log.h"
#include "tests/simulator/world.h"

namespace hvd::simulator {
namespace {

struct Range {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
};

struct CommandLine {
  Range ranks{2, 8};
  Range seeds{0, 999};
  bool control_only = false;
  bool trace = false;
};

constexpr const char* kUsage =
    "usage: simulator [--ranks LOW..HIGH] [--seeds FIRST..LAST] [--control-only]\n"
    "       simulator --replay SEED [--ranks LOW..HIGH] [--control-only] [--trace]\n";

std::optional<Range> parse_range(std::string_view text) {
  Range range;
  const char* const end = text.data() + text.size();
  const std::from_chars_result first = std::from_chars(text.data(), end, range.first);
  if (first.ec != std::errc()) return std::nullopt;
  range.last = range.first;
  if (first.ptr == end) return range;
  if (!std::string_view(first.ptr, static_cast<std::size_t>(end - first.ptr)).starts_with("..")) return std::nullopt;
  const std::from_chars_result last = std::from_chars(first.ptr + 2, end, range.last);
  if (last.ec != std::errc() || last.ptr != end || range.last < range.first) return std::nullopt;
  return range;
}

std::optional<CommandLine> parse(int argc, char** argv) {
  CommandLine line;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--control-only") {
      line.control_only = true;
    } else if (word == "--trace") {
      line.trace = true;
    } else if ((word == "--ranks" || word == "--seeds" || word == "--replay") && i + 1 < argc) {
      const std::optional<Range> range = parse_range(argv[++i]);
      if (!range) return std::nullopt;
      (word == "--ranks" ? line.ranks : line.seeds) = *range;
    } else {
      return std::nullopt;
    }
  }
  if (line.ranks.first < 1 || line.ranks.last > 4096) return std::nullopt;
  return line;
}

std::string replay_command(const CommandLine& line, std::uint64_t seed) {
  return fmt::format("simulator --replay {} --ranks {}..{}{} --trace", seed, line.ranks.first, line.ranks.last,
                     line.control_only ? " --control-only" : "");
}

// An internal check of the product ends the process, or a bad pointer does: this still tells which seed it was.
char running[160];

void on_crash(int signal) {
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, running, std::strlen(running));
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void add(Counts& sum, const Counts& one) {
  sum.operations += one.operations;
  sum.calls += one.calls;
  sum.fused_calls += one.fused_calls;
  sum.cache_hits += one.cache_hits;
  sum.evictions += one.evictions;
  sum.standing_calls += one.standing_calls;
  sum.withdrawn_calls += one.withdrawn_calls;
  sum.errors += one.errors;
  sum.deaths += one.deaths;
  sum.shutdowns += one.shutdowns;
  sum.faults += one.faults;
  sum.events += one.events;
}

void print_failure(const CommandLine& line, const Scenario& scenario, const Report& report) {
  std::printf("the invariant %s is broken\n  seed %llu: %s\n  %s\nlast events:\n%sreplay: %s\n",
              report.invariant.c_str(), static_cast<unsigned long long>(scenario.seed), summary(scenario).c_str(),
              report.text.c_str(), report.trace.c_str(), replay_command(line, scenario.seed).c_str());
}

int run(const CommandLine& line) {
  const ScenarioLimits limits{static_cast<int>(line.ranks.first), static_cast<int>(line.ranks.last), line.control_only};
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  Counts sum;
  std::uint64_t hash = 0;
  double next_progress = 30;
  for (std::uint64_t seed = line.seeds.first; seed <= line.seeds.last; ++seed) {
    std::snprintf(running, sizeof(running), "the simulator was at seed %llu; replay: %s\n",
                  static_cast<unsigned long long>(seed), replay_command(line, seed).c_str());
    const Scenario scenario = draw_scenario(seed, limits);
    const Report report = simulate(scenario, line.trace);
    if (!report.ok()) {
      print_failure(line, scenario, report);
      return 1;
    }
    add(sum, report.counts);
    hash = Random::mix(hash ^ report.trace_hash);
    if (seconds() > next_progress) {
      std::printf("seed %llu, %.0f s\n", static_cast<unsigned long long>(seed), seconds());
      std::fflush(stdout);
      next_progress += 30;
    }
  }
  std::printf(
      "%s\n",
      fmt::format("{} seeds ({}..{}) at {}..{} ranks in {:.1f} s: {} operations, {} calls, {} of them fused, {} "
                  "cache hits, {} evictions, {} standing calls, {} of them withdrawn, {} errors, {} deaths, {} "
                  "shutdowns, {} faults, {} events, trace "
                  "{:016x}",
                  line.seeds.last - line.seeds.first + 1, line.seeds.first, line.seeds.last, line.ranks.first,
                  line.ranks.last, seconds(), sum.operations, sum.calls, sum.fused_calls, sum.cache_hits, sum.evictions,
                  sum.standing_calls, sum.withdrawn_calls, sum.errors, sum.deaths, sum.shutdowns, sum.faults,
                  sum.events, hash)
          .c_str());
  return 0;
}

}  // namespace
}  // namespace hvd::simulator

int main(int argc, char** argv) {
  const auto line = hvd::simulator::parse(argc, argv);
  if (!line) {
    std::fputs(hvd::simulator::kUsage, stderr);
    return 2;
  }
  std::signal(SIGABRT, hvd::simulator::on_crash);
  std::signal(SIGSEGV, hvd::simulator::on_crash);
  hvd::log::configure(hvd::log::Level::kFatal, /*hide_time=*/true, /*rank=*/0, /*size=*/1);
  return hvd::simulator::run(*line);
}
