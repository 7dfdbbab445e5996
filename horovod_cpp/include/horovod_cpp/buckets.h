// How gradients are cut into buckets, where they are views of them; C++ and Python ranks, which meet in one job, both
// cut by these figures.
#pragma once

#include <cstdint>

namespace hvd {

/// A bucket takes no more gradients once it has so many bytes. A large one waits long for the last of its gradients,
/// and little of backward is left to hide the reduction of the last bucket; a small one costs an operation that is done
/// early. 16 MiB are some hundred times what the start of an operation costs, on any network.
inline constexpr std::int64_t kBucketBytes = 16 << 20;
/// The first bucket is ready early, so that the network has work nearly as long as backward lasts.
inline constexpr std::int64_t kFirstBucketBytes = 1 << 20;
/// Where each gradient begins: a cache line, and the widest vector register.
inline constexpr std::int64_t kBucketAlignmentBytes = 64;

}  // namespace hvd
