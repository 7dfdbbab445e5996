// A clock that stands still until a test moves it. One thread.
#pragma once

#include "common/clock.h"

namespace hvd::testing {

class ManualClock final : public Clock {
 public:
  explicit ManualClock(TimePoint start = {}) : now_(start) {}

  TimePoint now() const override { return now_; }
  void advance(Duration by) { now_ += by; }

 private:
  TimePoint now_;
};

}  // namespace hvd::testing
