// Reads a timeline back, line by line: the file has one event in each.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace hvd::testing {

/// The text of a field, without quotation marks; empty if the event has none. Objects end at their first brace.
inline std::string field(const std::string& event, const std::string& name) {
  const std::string start = "\"" + name + "\": ";
  std::size_t at = event.find(start);
  if (at == std::string::npos) return {};
  at += start.size();
  if (event[at] == '"') return event.substr(at + 1, event.find('"', at + 1) - at - 1);
  return event.substr(at, event.find_first_of(event[at] == '{' ? "}" : ",}", at) - at);
}

struct TimelineEvents {
  std::vector<std::string> events;            // each an object
  std::map<std::string, std::string> lanes;   // name by pid
  std::map<std::string, int> begun_by_place;  // "pid/tid": begun and not ended

  explicit TimelineEvents(const std::string& text) {
    EXPECT_TRUE(text.starts_with("[\n")) << text.substr(0, 200);
    EXPECT_TRUE(text.ends_with("\n]\n")) << text.substr(text.size() - std::min<std::size_t>(text.size(), 200));
    std::istringstream lines(text);
    std::string line;
    std::string last;
    while (std::getline(lines, line)) {
      if (line == "[" || line == "]") continue;
      EXPECT_TRUE(events.empty() || last.ends_with("},")) << last;
      last = line;
      if (line.ends_with(",")) line.pop_back();
      EXPECT_TRUE(line.starts_with("{") && line.ends_with("}")) << line;
      events.push_back(line);
      take(line);
    }
    EXPECT_FALSE(last.ends_with(",")) << last;
  }

  static std::string read(const std::string& path) {
    std::ifstream file(path);
    EXPECT_TRUE(file.good()) << path;
    return {std::istreambuf_iterator<char>(file), {}};
  }

  /// What was begun in a lane, in order; ticks of ranks in brackets, the end as "/".
  std::string story(const std::string& lane) const {
    std::string text;
    for (const std::string& event : events) {
      const std::string kind = field(event, "ph");
      const auto known = lanes.find(field(event, "pid"));
      if (known == lanes.end() || known->second != lane || kind == "M") continue;
      const std::string what = kind == "E"   ? "/"
                               : kind == "X" ? "(" + field(event, "name") + ")"
                                             : field(event, "name");
      text += (text.empty() ? "" : " ") + what;
    }
    return text;
  }

  /// The first event of that name in a lane.
  std::string event(const std::string& lane, const std::string& name) const {
    for (const std::string& event : events) {
      const auto known = lanes.find(field(event, "pid"));
      if (known != lanes.end() && known->second == lane && field(event, "ph") != "M" && field(event, "name") == name) {
        return event;
      }
    }
    return {};
  }

  bool all_have_ended() const {
    for (const auto& [place, begun] : begun_by_place) {
      if (begun != 0) return false;
    }
    return true;
  }

 private:
  void take(const std::string& event) {
    const std::string place = field(event, "pid") + "/" + field(event, "tid");
    const std::string kind = field(event, "ph");
    if (kind == "M" && field(event, "name") == "process_name") lanes[field(event, "pid")] = name_of_lane(event);
    if (kind == "B") ++begun_by_place[place];
    if (kind == "E") {
      --begun_by_place[place];
      EXPECT_GE(begun_by_place[place], 0) << event;
    }
  }
  static std::string name_of_lane(const std::string& event) {
    return field(event.substr(event.find("\"args\"")), "name");
  }
};

}  // namespace hvd::testing
