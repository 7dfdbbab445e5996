// What a test draws its numbers from: new ones in each run, and the same again where a run is to be repeated.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <random>

namespace hvd::testing {

/// That of --gtest_random_seed=N, or a fresh one; printed.
inline std::uint64_t seed_of_this_run() {
  int seed = GTEST_FLAG_GET(random_seed);
  if (seed == 0) seed = static_cast<int>(std::random_device()() % 99'999 + 1);
  std::printf("seed: --gtest_random_seed=%d\n", seed);
  return static_cast<std::uint64_t>(seed);
}

inline std::mt19937_64 generator_of_this_run() { return std::mt19937_64(seed_of_this_run()); }

}  // namespace hvd::testing
