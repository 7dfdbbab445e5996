// Checks for bugs of ours; what users, peers and machines do is a Status, never a check.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace hvd::detail {

[[noreturn]] inline void check_failed(const char* expression, const char* file, int line) {
  std::fprintf(stderr, "horovod_cpp: internal check failed: %s (%s:%d)\n", expression, file, line);
  std::abort();
}

}  // namespace hvd::detail

#define HVD_CHECK(expression) \
  ((expression) ? static_cast<void>(0) : ::hvd::detail::check_failed(#expression, __FILE__, __LINE__))

#ifdef NDEBUG
#define HVD_DCHECK(expression) static_cast<void>(sizeof(expression))
#else
#define HVD_DCHECK(expression) HVD_CHECK(expression)
#endif
