#include "ops/algorithms/adasum_halving.h"

#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/reduce/adasum_functions.h"

namespace hvd {
namespace {

// A vector that is zero has no direction to lose.
double weight(double ab, double own) { return own > 0.0 ? 1.0 - ab / (2.0 * own) : 1.0; }

void combine(DataType dtype, std::byte* own, const std::byte* other, std::size_t count, const DotProducts& whole) {
  add_weighted(dtype, own, own, weight(whole.ab, whole.aa), other, weight(whole.ab, whole.bb), count);
}

// The elements of a vector that a rank holds.
struct Piece {
  std::size_t begin;
  std::size_t end;
  std::size_t middle() const { return begin + (end - begin) / 2; }
  std::size_t count() const { return end - begin; }
};

constexpr std::size_t kNumbers = 3;

// Adds up the numbers of the ranks of an aligned block of 2^k ranks, on each of them: two values that lie in memory of
// the call, of which one is sent while the other is filled.
Task<Status> sum_in_block(CollectiveContext& context, double* numbers, int block) {
  Result<Reducer> reducer = find_reducer(DataType::kFloat64, ReduceOp::kSum);
  if (!reducer) co_return reducer.status();
  double* value = numbers;
  double* next = numbers + kNumbers;
  for (int distance = 1; distance < block; distance *= 2) {
    const int partner = context.rank() ^ distance;
    const OperandOrder order = partner < context.rank() ? OperandOrder::kIncomingFirst : OperandOrder::kOwnFirst;
    const std::span<std::byte> place = std::as_writable_bytes(std::span(next, kNumbers));
    Pending received = context.receive_combine(  // NOLINT(misc-const-correctness): co_await changes it
        partner, place, reinterpret_cast<const std::byte*>(value), *reducer, order);
    HVD_CO_RETURN_IF_ERROR(co_await context.send(partner, std::as_bytes(std::span(value, kNumbers))));
    HVD_CO_RETURN_IF_ERROR(co_await received);
    std::swap(value, next);
  }
  if (value != numbers) std::memcpy(numbers, value, kNumbers * sizeof(double));
  co_return Status();
}

}  // namespace

Task<Status> adasum_halving(CollectiveContext& context, std::span<std::byte> data, DataType dtype) {
  const int rank = context.rank();
  const int size = context.size();
  const std::size_t element = size_of(dtype);
  const int paired = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
  const auto bytes_of = [&](Piece piece) { return data.subspan(piece.begin * element, piece.count() * element); };
  if (size == 1) co_return Status();
  std::byte* const scratch = context.lease(data.size() + 2 * kNumbers * sizeof(double));
  if (scratch == nullptr) co_return Status::internal("no memory for an Adasum");
  auto* const numbers = reinterpret_cast<double*>(scratch);  // at the start, which is aligned
  std::byte* const other = scratch + 2 * kNumbers * sizeof(double);
  const Piece all{0, data.size() / element};
  if (rank >= paired) {  // hands its operand to a partner and gets the result
    HVD_CO_RETURN_IF_ERROR(co_await context.send(rank - paired, data));
    HVD_CO_RETURN_IF_ERROR(co_await context.receive(rank - paired, data));
    co_return Status();
  }
  const int folded = rank + paired;
  if (folded < size) {
    HVD_CO_RETURN_IF_ERROR(co_await context.receive(folded, {other, data.size()}));
    combine(dtype, data.data(), other, all.count(), dot_products(dtype, data.data(), other, all.count()));
  }
  std::vector<Piece> pieces{all};  // what this rank held before each step
  for (int distance = 1; distance < paired; distance *= 2) {
    const Piece held = pieces.back();
    const int partner = rank ^ distance;
    const bool lower = partner > rank;
    const Piece kept = lower ? Piece{held.begin, held.middle()} : Piece{held.middle(), held.end};
    const Piece given = lower ? Piece{held.middle(), held.end} : Piece{held.begin, held.middle()};
    const std::span<std::byte> own = bytes_of(kept);
    // NOLINTNEXTLINE(misc-const-correctness): co_await changes it
    Pending received = context.receive(partner, {other, own.size()});
    HVD_CO_RETURN_IF_ERROR(co_await context.send(partner, bytes_of(given)));
    HVD_CO_RETURN_IF_ERROR(co_await received);
    // The lower half of the ranks has the operand `a`: all agree on which is which.
    const DotProducts mine = lower ? dot_products(dtype, own.data(), other, kept.count())
                                   : dot_products(dtype, other, own.data(), kept.count());
    numbers[0] = mine.aa;
    numbers[1] = mine.ab;
    numbers[2] = mine.bb;
    HVD_CO_RETURN_IF_ERROR(co_await sum_in_block(context, numbers, 2 * distance));
    const DotProducts whole =
        lower ? DotProducts{numbers[0], numbers[1], numbers[2]} : DotProducts{numbers[2], numbers[1], numbers[0]};
    combine(dtype, own.data(), other, kept.count(), whole);
    pieces.push_back(kept);
  }
  for (int distance = paired / 2; distance > 0; distance /= 2) {
    const Piece kept = pieces.back();
    pieces.pop_back();
    const Piece held = pieces.back();
    const int partner = rank ^ distance;
    const Piece missing = partner > rank ? Piece{kept.end, held.end} : Piece{held.begin, kept.begin};
    // NOLINTNEXTLINE(misc-const-correctness): co_await changes it
    Pending received = context.receive(partner, bytes_of(missing));
    HVD_CO_RETURN_IF_ERROR(co_await context.send(partner, bytes_of(kept)));
    HVD_CO_RETURN_IF_ERROR(co_await received);
  }
  if (folded < size) HVD_CO_RETURN_IF_ERROR(co_await context.send(folded, data));
  co_return Status();
}

}  // namespace hvd
