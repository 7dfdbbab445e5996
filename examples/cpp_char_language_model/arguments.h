// What the command line says: `--name value`, any number of them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <stdexcept>
#include <string>

namespace char_language_model {

struct Arguments {
  std::string text = "/usr/share/common-licenses";  ///< a text file, or a folder of them
  std::string checkpoint;        ///< a file: read at the start if it is there, written every 100 steps and at the end
  std::int64_t steps = 400;      ///< in all, with those that a checkpoint has behind it
  std::int64_t batch_size = 16;  ///< stretches of text a step on each rank
  std::int64_t length = 64;      ///< characters of a stretch
  std::int64_t hidden = 192;     ///< size of the network's memory
  double learning_rate = 0.004;  ///< of the first step, for one rank
  double clip = 1.0;             ///< longest gradient, all parameters taken together
  std::int64_t seed = 42;
};

inline Arguments parse(std::span<char*> words) {
  Arguments parsed;
  const auto number = [](std::int64_t& to) { return [&to](const std::string& value) { to = std::stoll(value); }; };
  const auto real = [](double& to) { return [&to](const std::string& value) { to = std::stod(value); }; };
  const auto word = [](std::string& to) { return [&to](const std::string& value) { to = value; }; };
  const std::map<std::string, std::function<void(const std::string&)>> known{
      {"--text", word(parsed.text)},
      {"--checkpoint", word(parsed.checkpoint)},
      {"--steps", number(parsed.steps)},
      {"--batch-size", number(parsed.batch_size)},
      {"--length", number(parsed.length)},
      {"--hidden", number(parsed.hidden)},
      {"--learning-rate", real(parsed.learning_rate)},
      {"--clip", real(parsed.clip)},
      {"--seed", number(parsed.seed)},
  };
  for (std::size_t i = 0; i < words.size(); i += 2) {
    const auto found = known.find(words[i]);
    if (found == known.end() || i + 1 == words.size()) {
      std::string names;
      for (const auto& [name, set] : known) names += " " + name;
      throw std::invalid_argument(std::string(words[i]) + " does not go; each of these takes a value:" + names);
    }
    found->second(words[i + 1]);
  }
  return parsed;
}

}  // namespace char_language_model
