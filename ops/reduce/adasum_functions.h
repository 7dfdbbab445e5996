// The two passes of an Adasum over a stretch of memory: dot products, and a weighted sum.
// Pure functions of their arguments; any thread.
#pragma once

#include <cstddef>

#include <horovod_cpp/data_type.h>

namespace hvd {

/// Of a stretch of two vectors; those of whole vectors are the sums over their stretches.
struct DotProducts {
  double aa = 0;
  double ab = 0;
  double bb = 0;
};

/// For floating-point types; computed in float64.
DotProducts dot_products(DataType type, const void* a, const void* b, std::size_t count);

/// out[i] = weight_a * a[i] + weight_b * b[i] in float64, rounded once. `out` may be `a` or `b`.
void add_weighted(DataType type, void* out, const void* a, double weight_a, const void* b, double weight_b,
                  std::size_t count);

}  // namespace hvd
