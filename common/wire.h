// Bytes of control messages: a writer that appends, and a reader that never reads past the end.
// Integers are little-endian; counts and ids are variable-length (LEB128). Pure values; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace hvd {

class WireWriter {
 public:
  template <typename T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  void fixed(T value) {
    const std::size_t place = bytes_.size();
    bytes_.resize(place + sizeof value);
    std::memcpy(bytes_.data() + place, &value, sizeof value);
  }
  void varint(std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_.push_back(static_cast<std::byte>(value | 0x80));
    bytes_.push_back(static_cast<std::byte>(value));
  }
  void text(std::string_view value) {
    varint(value.size());
    const std::size_t place = bytes_.size();
    bytes_.resize(place + value.size());
    if (!value.empty()) std::memcpy(bytes_.data() + place, value.data(), value.size());
  }
  void integers(const std::vector<std::int64_t>& values) {
    varint(values.size());
    for (const std::int64_t value : values) varint(static_cast<std::uint64_t>(value));
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

/// After a read past the end, or of a count that cannot be true, `ok` is false and every value is zero.
class WireReader {
 public:
  explicit WireReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  bool ok() const { return ok_; }
  bool at_end() const { return rest_.empty(); }

  template <typename T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  T fixed() {
    T value{};
    if (rest_.size() < sizeof value) {
      fail();
      return value;
    }
    std::memcpy(&value, rest_.data(), sizeof value);
    rest_ = rest_.subspan(sizeof value);
    return value;
  }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64 && !rest_.empty(); shift += 7) {
      const auto byte = static_cast<std::uint64_t>(rest_.front());
      rest_ = rest_.subspan(1);
      value |= (byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    fail();
    return 0;
  }
  template <typename T>
  T number() {
    const std::uint64_t value = varint();
    if (value > static_cast<std::uint64_t>(std::numeric_limits<T>::max())) fail();
    return ok_ ? static_cast<T>(value) : T{};
  }
  std::string text() {
    const std::size_t size = count(1);
    std::string value(reinterpret_cast<const char*>(rest_.data()), size);
    rest_ = rest_.subspan(size);
    return value;
  }
  std::vector<std::int64_t> integers() {
    std::vector<std::int64_t> values(count(1));
    for (std::int64_t& value : values) value = static_cast<std::int64_t>(varint());
    return values;
  }
  /// A number of things that take at least `bytes_each` bytes: bounded by what is left, so that nothing is
  /// allocated that the message cannot fill.
  std::size_t count(std::size_t bytes_each) {
    const std::uint64_t value = varint();
    if (value > rest_.size() / bytes_each) fail();
    return ok_ ? static_cast<std::size_t>(value) : 0;
  }

 private:
  void fail() {
    ok_ = false;
    rest_ = {};
  }

  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace hvd
