// The doorbell of a rank: up when a peer has rung, down once the rank has looked.
#include "ops/transport/shm/shm_wakeup.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <utility>

namespace hvd::testing {
namespace {

bool is_up(const ShmWakeup& wakeup) {
  pollfd place{wakeup.fd(), POLLIN, 0};
  return ::poll(&place, 1, 0) == 1;
}

class Doorbell : public ::testing::Test {
 protected:
  void SetUp() override {
    auto made = ShmWakeup::create(slot_bytes_for(2));
    ASSERT_TRUE(made.ok()) << made.status().text();
    wakeup_ = std::move(made).value();
    auto mapped = SharedMapping::map(wakeup_->presence_file(), wakeup_->presence_bytes());
    ASSERT_TRUE(mapped.ok()) << mapped.status().text();
    mapping_ = std::move(mapped).value();
    wakeup_->refresh();  // the first look, which is due in any case
  }
  void put_up() const {
    const std::uint64_t one = 1;
    ASSERT_EQ(::write(wakeup_->doorbell(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  }
  void count() { reinterpret_cast<ShmPresence*>(mapping_.bytes().data())->rings.fetch_add(1); }
  void sleep_and_come_back() {
    wakeup_->set_sleeping(true);
    wakeup_->set_sleeping(false);
    wakeup_->refresh();
  }

  std::unique_ptr<ShmWakeup> wakeup_;

 private:
  SharedMapping mapping_;
};

TEST_F(Doorbell, IsDownAfterTheLookThatFollowsARing) {
  for (int time = 0; time < 3; ++time) {
    put_up();
    count();
    EXPECT_TRUE(is_up(*wakeup_));
    sleep_and_come_back();
    EXPECT_FALSE(is_up(*wakeup_));
  }
}

// A peer may be interrupted between the two: the sleeper is awake by then and looks when it hears of the ring.
TEST_F(Doorbell, IsDownWhenTheCountComesLate) {
  wakeup_->set_sleeping(true);
  put_up();
  wakeup_->set_sleeping(false);
  wakeup_->refresh();
  count();
  sleep_and_come_back();
  EXPECT_FALSE(is_up(*wakeup_));
}

// A peer that ends between the two never counts.
TEST_F(Doorbell, IsDownAfterAMillisecondWithoutACount) {
  put_up();
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  sleep_and_come_back();
  EXPECT_FALSE(is_up(*wakeup_));
}

}  // namespace
}  // namespace hvd::testing
