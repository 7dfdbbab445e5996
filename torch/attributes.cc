#include "torch/attributes.h"

#include <algorithm>
#include <cstddef>
#include <set>
#include <vector>

namespace hvd::torch::detail {
namespace {

constexpr char kEnd = '\n';
constexpr char kBetween = '\t';
constexpr std::string_view kBlanks = " \t\n\v\f\r";

std::vector<std::string_view> parts_of(std::string_view text, std::string_view separators) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t end = text.find_first_of(separators);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

// Each run of blanks as one space, none at the ends.
std::string one_line(std::string_view text) {
  std::string line;
  for (const std::string_view word : parts_of(text, kBlanks)) {
    if (word.empty()) continue;
    if (!line.empty()) line += ' ';
    line += word;
  }
  return line;
}

using Row = std::vector<std::string_view>;

std::vector<Row> rows_of(std::string_view gathered) {
  std::vector<Row> rows;
  for (const std::string_view line : parts_of(gathered, {&kEnd, 1})) rows.push_back(parts_of(line, {&kBetween, 1}));
  rows.pop_back();  // what is behind the last end
  return rows;
}

// "rank 3", "ranks 0-2,4-7".
std::string rank_text(std::span<const int> ranks) {
  std::string text = ranks.size() > 1 ? "ranks " : "rank ";
  for (std::size_t first = 0; first < ranks.size();) {
    std::size_t last = first;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    if (first > 0) text += ',';
    text += std::to_string(ranks[first]);
    if (last > first) text += '-' + std::to_string(ranks[last]);
    first = last + 1;
  }
  return text;
}

// A value, who said it, and where in their programs.
struct Said {
  std::string_view value;
  std::vector<int> ranks{};
  std::set<std::string_view> sites{};

  std::string text() const {
    std::string text = std::string(value) + ": " + rank_text(ranks);
    if (sites.empty()) return text;
    text += " (";
    for (const std::string_view site : sites) (text += site == *sites.begin() ? "" : ", ") += site;
    return text + ')';
  }
};

// The different values of one attribute, in the order of the ranks that said them first.
std::vector<Said> values_of(const std::vector<Row>& rows, std::size_t column, std::span<const int> ranks) {
  std::vector<Said> all;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::string_view value = rows[i][column];
    auto place = std::find_if(all.begin(), all.end(), [&](const Said& said) { return said.value == value; });
    if (place == all.end()) place = all.insert(all.end(), {.value = value});
    place->ranks.push_back(ranks[i]);
    if (!rows[i].back().empty()) place->sites.insert(rows[i].back());
  }
  return all;
}

}  // namespace

std::string encode_attributes(std::span<const std::string> values, const std::source_location& site) {
  std::string line;
  for (const std::string& value : values) (line += one_line(value)) += kBetween;
  const std::string file = site.file_name();
  if (!file.empty()) line += one_line(file + ':' + std::to_string(site.line()));
  return line + kEnd;
}

std::string disagreements(std::span<const std::string_view> names, std::string_view gathered,
                          std::span<const int> ranks) {
  const std::vector<Row> rows = rows_of(gathered);
  const bool is_readable = rows.size() == ranks.size() && std::all_of(rows.begin(), rows.end(), [&](const Row& row) {
                             return row.size() == names.size() + 1;
                           });
  if (!is_readable) return "a rank has another operation by this name";
  std::string text;
  for (std::size_t column = 0; column < names.size(); ++column) {
    const std::vector<Said> all = values_of(rows, column, ranks);
    if (all.size() == 1) continue;
    ((text += text.empty() ? "mismatched " : "; mismatched ") += names[column]) += ": ";
    for (const Said& said : all) text += (&said == all.data() ? "" : "; ") + said.text();
  }
  return text;
}

}  // namespace hvd::torch::detail
