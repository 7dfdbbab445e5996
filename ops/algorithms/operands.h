// The same stretch of the operands of all ranks, and their sums in the order of one or the other algorithm: where one
// rank has all operands at once, the bits of a result are those of the algorithm that passes them on.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "ops/reduce/reducer.h"

namespace hvd {

class Operands {
 public:
  Operands(int size, std::size_t bytes)
      : bytes_(bytes), value_(static_cast<std::size_t>(size)), room_(static_cast<std::size_t>(size)) {}
  /// Begins with other operands; spare room stays.
  void begin(std::size_t bytes);

  std::size_t bytes() const { return bytes_; }
  std::span<std::byte> room_of(int rank) { return {room_[static_cast<std::size_t>(rank)], bytes_}; }
  /// What a rank brings; it is only read.
  void put(int rank, const std::byte* value) { value_[static_cast<std::size_t>(rank)] = value; }
  /// What a rank brings, where results may take its place.
  void put_in_room(int rank, std::byte* value) {
    value_[static_cast<std::size_t>(rank)] = room_[static_cast<std::size_t>(rank)] = value;
  }
  /// Room for a result. As many are needed as results come before the last that are of two operands that are only read.
  void add_spare(std::byte* room) { spare_.push_back(room); }
  /// Of these there are so many at most.
  static int most_spares(int size) { return size / 2; }

  /// The last result goes to `output`.
  void sum_as_recursive_doubling(std::byte* output, const Reducer& reducer);
  /// A chunk that the ring begins to sum at `rank`.
  void sum_as_ring(int rank, std::byte* output, const Reducer& reducer);

 private:
  void combine(int left, int right, std::byte* output, const Reducer& reducer);

  std::size_t bytes_;
  std::vector<const std::byte*> value_;
  std::vector<std::byte*> room_;
  std::vector<std::byte*> spare_;
  std::size_t spares_used_ = 0;
};

}  // namespace hvd
