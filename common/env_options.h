// Options from HOROVOD_* variables, strictly read, and the only getenv of the project.
// Called at init, by the thread that calls it.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <horovod_cpp/options.h>
#include <horovod_cpp/status.h>

namespace hvd {

/// The value of an environment variable, if it is set.
std::optional<std::string> environment(const char* name);

struct Setting {
  std::string name;
  std::string value;
};

/// The defaults, changed by the variables that are set, changed by what the program gives under the same names.
/// Junk is kInvalidArgument with variable, value and range; so is a given name that is none.
Result<Options> options_from_environment(std::span<const Setting> given = {});

/// The settings that all ranks must have alike, as texts for the handshake.
std::vector<Setting> agreed_settings(const Options& options);

/// What README and the handshake list: name, meaning, whether ranks must agree.
struct Knob {
  std::string_view name;
  std::string_view meaning;
  bool agreed;
};
std::span<const Knob> knobs();

}  // namespace hvd
