// A text as numbers of its characters, which are bytes here.
#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace char_language_model {

/// A text file, or all files of a folder, in the order of their names; links are left out.
inline std::string read_text(const std::filesystem::path& path) {
  std::vector<std::filesystem::path> files;
  if (std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      if (entry.is_regular_file() && !entry.is_symlink()) files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
  } else {
    files.push_back(path);
  }
  std::ostringstream text;
  for (const auto& file : files) {
    const std::ifstream stream(file, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + file.string() + "; name a text with --text");
    text << stream.rdbuf() << '\n';
  }
  return std::move(text).str();
}

struct Text {
  std::string alphabet;       ///< a character's number is its place
  torch::Tensor train, test;  ///< the last tenth is for tests

  explicit Text(const std::string& characters) {
    const std::set<char> different(characters.begin(), characters.end());
    alphabet.assign(different.begin(), different.end());
    std::vector<std::int64_t> numbers;
    numbers.reserve(characters.size());
    for (const char character : characters) numbers.push_back(static_cast<std::int64_t>(alphabet.find(character)));
    const torch::Tensor all = torch::tensor(numbers);
    train = all.slice(0, 0, all.size(0) * 9 / 10);
    test = all.slice(0, all.size(0) * 9 / 10);
  }

  /// `count` stretches of `length` + 1 characters, from the place `first` on of those that step `step` reads. They
  /// depend on nothing else, so all ranks together read the same whatever their number, also after a resume.
  torch::Tensor stretches(std::int64_t seed, std::int64_t step, std::int64_t first, std::int64_t count,
                          std::int64_t length) const {
    std::seed_seq seeds{seed, step};
    std::mt19937_64 places(seeds);
    places.discard(static_cast<unsigned long long>(first));
    std::vector<torch::Tensor> chosen;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto start = static_cast<std::int64_t>(places() % static_cast<std::uint64_t>(train.size(0) - length));
      chosen.push_back(train.slice(0, start, start + length + 1));
    }
    return torch::stack(chosen);
  }
};

}  // namespace char_language_model
