// The kernel itself, once for each way to treat an element, and its launches.
// Launched by any thread; each block works on one part of one piece and shares nothing with others.
#include "ops/device/cuda/convert_kernels.h"

#include <array>

#include "ops/device/cuda/element_math.h"
#include "ops/device/cuda/piece_walk.h"

namespace hvd::cuda {
namespace {

// The whole of what a launch passes; CUDA before 12.1, and drivers of its time, take no more.
static_assert(sizeof(PieceTable) + sizeof(DeviceConversion) <= 4096);

template <unsigned kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = std::uint8_t;
};
template <>
struct Word<2> {
  using Type = std::uint16_t;
};
template <>
struct Word<4> {
  using Type = std::uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

/// Elements that move with one access.
template <class T, unsigned kLanes>
struct Vector {
  using Access = typename Word<sizeof(T) * kLanes>::Type;

  T lanes[kLanes];

  __device__ void load(const T* from) {
    const Access word = *reinterpret_cast<const Access*>(from);
    memcpy(lanes, &word, sizeof word);
  }
  __device__ void store(T* to) const {
    Access word;
    memcpy(&word, lanes, sizeof word);
    *reinterpret_cast<Access*>(to) = word;
  }
};

template <unsigned kLanes, class Operation, class From, class To>
__device__ void walk_vectors(const Operation& operation, const From* from, To* to, std::size_t first,
                             std::size_t last) {
  for (std::size_t at = first + threadIdx.x; at < last; at += kUnroll * kThreads) {
    // All loads before the first store: the compiler cannot know that pieces do not overlap, and would keep their
    // order.
    Vector<From, kLanes> in[kUnroll];
    if constexpr (Operation::kReads) {
#pragma unroll
      for (unsigned k = 0; k < kUnroll; ++k) {
        if (at + k * kThreads < last) in[k].load(from + (at + k * kThreads) * kLanes);
      }
    }
#pragma unroll
    for (unsigned k = 0; k < kUnroll; ++k) {
      if (at + k * kThreads < last) {
        Vector<To, kLanes> out;
#pragma unroll
        for (unsigned lane = 0; lane < kLanes; ++lane) {
          if constexpr (Operation::kReads) {
            out.lanes[lane] = operation(in[k].lanes[lane]);
          } else {
            out.lanes[lane] = operation();
          }
        }
        out.store(to + (at + k * kThreads) * kLanes);
      }
    }
  }
}

template <class Operation, class From, class To>
__device__ void convert_one(const Operation& operation, const From* from, To* to) {
  if constexpr (Operation::kReads) {
    *to = operation(*from);
  } else {
    *to = operation();
  }
}

/// This block's part of the piece.
template <unsigned kWide, unsigned kNarrow, class Operation>
__device__ void convert_part(const Operation& operation, const DevicePiece& piece, const PieceSplit& split,
                             const BlockPart& part) {
  const auto* from = static_cast<const typename Operation::FromType*>(piece.from);
  auto* to = static_cast<typename Operation::ToType*>(piece.to);
  if (part.head && threadIdx.x < split.head) convert_one(operation, from + threadIdx.x, to + threadIdx.x);
  if (part.tail && threadIdx.x < split.tail) {
    const std::size_t at = piece.count - split.tail + threadIdx.x;
    convert_one(operation, from + at, to + at);
  }
  from += split.head;
  to += split.head;
  if (split.lanes == kWide) {
    walk_vectors<kWide>(operation, from, to, part.first, part.last);
  } else if (kNarrow > 1 && split.lanes == kNarrow) {
    walk_vectors<kNarrow>(operation, from, to, part.first, part.last);
  } else {
    walk_vectors<1>(operation, from, to, part.first, part.last);
  }
}

template <class Operation>
__global__ void __launch_bounds__(kThreads)
    convert_pieces(const __grid_constant__ PieceTable table, const __grid_constant__ DeviceConversion conversion) {
  using To = typename Operation::ToType;
  constexpr ElementBytes kBytes{sizeof(typename Operation::FromType), sizeof(To)};
  constexpr unsigned kWide = wide_lanes(kBytes);
  constexpr unsigned kNarrow = narrow_lanes(kBytes);

  const unsigned index = table.piece_of(blockIdx.x);
  const DevicePiece piece = table.pieces[index];
  const PieceSplit split = split_piece(reinterpret_cast<std::uintptr_t>(piece.from),
                                       reinterpret_cast<std::uintptr_t>(piece.to), piece.count, kBytes);
  const BlockPart part = part_of(blockIdx.x - table.first_block[index], piece.count, split, kBytes);
  if (piece.from != nullptr) {
    convert_part<kWide, kNarrow>(Operation(conversion), piece, split, part);
  } else {
    convert_part<kWide, kNarrow>(Fill<To>(conversion), piece, split, part);
  }
}

// ---- The kernels by what they do ----

using Kernel = void(PieceTable, DeviceConversion);

/// A kernel and the sizes that its blocks are counted by; no kernel: there is no such conversion.
struct KernelChoice {
  Kernel* kernel = nullptr;
  ElementBytes bytes{};
};

template <class From, class To, Mode kMode>
KernelChoice chosen() {
  return {convert_pieces<Convert<From, To, kMode>>, {sizeof(From), sizeof(To)}};
}

template <class From, class To = From>
KernelChoice computing(Mode mode) {
  switch (mode) {
    case Mode::kMove:
      // One type: what is moved are bytes, see moving().
      if constexpr (!std::is_same_v<From, To>) return chosen<From, To, Mode::kMove>();
      break;
    case Mode::kScale:
      return chosen<From, To, Mode::kScale>();
    case Mode::kDivide:
      if constexpr (!std::is_same_v<From, Bool>) return chosen<From, To, Mode::kDivide>();
      break;
    case Mode::kScaleAndDivide:
      if constexpr (!std::is_same_v<From, Bool>) return chosen<From, To, Mode::kScaleAndDivide>();
      break;
  }
  return {};
}

KernelChoice moving(std::size_t element_bytes) {
  switch (element_bytes) {
    case 1:
      return chosen<std::uint8_t, std::uint8_t, Mode::kMove>();
    case 2:
      return chosen<std::uint16_t, std::uint16_t, Mode::kMove>();
    case 4:
      return chosen<std::uint32_t, std::uint32_t, Mode::kMove>();
    case 8:
      return chosen<std::uint64_t, std::uint64_t, Mode::kMove>();
    default:
      return {};
  }
}

KernelChoice find_kernel(DataType from, DataType to, Mode mode) {
  if (from == DataType::kInt16 && to == DataType::kInt32) return computing<std::int16_t, std::int32_t>(mode);
  if (from == DataType::kInt32 && to == DataType::kInt16) return computing<std::int32_t, std::int16_t>(mode);
  if (from != to) return {};
  if (mode == Mode::kMove) return moving(size_of(from));
  switch (from) {
    case DataType::kUint8:
      return computing<std::uint8_t>(mode);
    case DataType::kInt8:
      return computing<std::int8_t>(mode);
    case DataType::kInt16:
      return computing<std::int16_t>(mode);
    case DataType::kInt32:
      return computing<std::int32_t>(mode);
    case DataType::kInt64:
      return computing<std::int64_t>(mode);
    case DataType::kFloat16:
      return computing<Float16>(mode);
    case DataType::kFloat32:
      return computing<float>(mode);
    case DataType::kFloat64:
      return computing<double>(mode);
    case DataType::kBool:
      return computing<Bool>(mode);
    case DataType::kBfloat16:
      return computing<Bfloat16>(mode);
  }
  return {};
}

cudaError_t launch(Kernel* kernel, PieceTable& table, DeviceConversion& conversion, cudaStream_t stream) {
  void* arguments[] = {&table, &conversion};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(table.blocks), dim3(kThreads), arguments,
                          /*sharedMem=*/0, stream);
}

}  // namespace

cudaError_t load_kernels() {
  for (const DataTypeInfo& from : kDataTypes) {
    for (const DataTypeInfo& to : kDataTypes) {
      for (const Mode mode : {Mode::kMove, Mode::kScale, Mode::kDivide, Mode::kScaleAndDivide}) {
        const KernelChoice choice = find_kernel(from.type, to.type, mode);
        if (choice.kernel == nullptr) continue;
        cudaFuncAttributes unused;
        const cudaError_t error = cudaFuncGetAttributes(&unused, reinterpret_cast<const void*>(choice.kernel));
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t launch_convert(const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                           cudaStream_t stream) {
  DeviceConversion simple = simplest(conversion);
  const Mode mode = mode_of(simple);
  const KernelChoice choice = find_kernel(simple.from_type, simple.to_type, mode);
  if (choice.kernel == nullptr) return cudaErrorInvalidValue;
  const bool only_copies = mode == Mode::kMove && simple.from_type == simple.to_type;

  PieceTable table;
  for (const DevicePiece& piece : pieces) {
    if (piece.count > PieceTable::most_elements(choice.bytes)) return cudaErrorInvalidValue;
    if (only_copies && piece.from == piece.to) continue;
    if (table.add(piece, choice.bytes)) continue;
    if (const cudaError_t error = launch(choice.kernel, table, simple, stream); error != cudaSuccess) return error;
    table.size = table.blocks = 0;
    table.add(piece, choice.bytes);
  }
  return table.blocks == 0 ? cudaSuccess : launch(choice.kernel, table, simple, stream);
}

}  // namespace hvd::cuda
