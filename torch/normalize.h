// Normalises a batch with the statistics of the batches of all ranks: a function that autograd records. One thread of a
// process at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <source_location>
#include <string>

#include <horovod_cpp/process_set.h>

namespace hvd::torch::detail {

/// A value for each channel, and how many values a channel has in all, in double precision. All stay on the device: the
/// host would stop there in every layer, and nothing could be captured into a graph.
struct ChannelStatistics {
  at::Tensor mean, variance;  // of all values: divided by their number
  at::Tensor count;           // of no dimension
};

struct Normalization {
  std::int64_t channels;
  double eps;
  ProcessSet process_set;
  std::source_location site;
};

/// Blocks, here and in backward. `weight` and `bias` may both be undefined. Writes what it found to `statistics`.
/// Throws InvalidArgument on all ranks for another number of channels, or less than two values for each.
at::Tensor normalize(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                     const Normalization& normalization, ChannelStatistics& statistics);

[[noreturn]] void refuse_batch(const std::string& reason, const std::source_location& site);

}  // namespace hvd::torch::detail
