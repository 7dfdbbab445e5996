// A rank of a job: every rank runs the same tests in the same order, under whatever has started it.
#include <gtest/gtest.h>

#include <horovod_cpp/hvd.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const hvd::Session session({.settings = {{"HOROVOD_DYNAMIC_PROCESS_SETS", "1"}}});
  return RUN_ALL_TESTS();
}
