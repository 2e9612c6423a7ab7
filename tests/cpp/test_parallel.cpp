// SPDX-License-Identifier: Apache-2.0
#include "dsa/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

namespace dsa {
namespace {

std::vector<int> visits(std::int64_t begin, std::int64_t end, std::int64_t grain) {
  std::vector<int> counts(static_cast<std::size_t>(end - begin), 0);
  parallel_for(begin, end, grain, [&](std::int64_t b, std::int64_t e) {
    EXPECT_LT(b, e);
    for (std::int64_t i = b; i < e; ++i) ++counts[static_cast<std::size_t>(i - begin)];
  });
  return counts;
}

TEST(ParallelFor, VisitsEachIndexOnce) {
  for (const std::int64_t size : {1, 2, 3, 7, 8, 9, 64, 1000}) {
    for (const std::int64_t grain : {0, 1, 2, 5, 63, 64, 2000}) {
      const std::vector<int> expected(static_cast<std::size_t>(size), 1);
      EXPECT_EQ(visits(0, size, grain), expected) << size << " by " << grain;
      EXPECT_EQ(visits(-5, size - 5, grain), expected) << size << " by " << grain;
    }
  }
}

TEST(ParallelFor, EmptyRangesCallNothing) {
  const auto never = [](std::int64_t, std::int64_t) { ADD_FAILURE(); };
  parallel_for(0, 0, 1, never);
  parallel_for(5, 3, 1, never);
}

TEST(ParallelFor, RangesAreAtLeastAGrain) {
  std::atomic<std::int64_t> total{0};
  parallel_for(0, 103, 10, [&](std::int64_t b, std::int64_t e) {
    EXPECT_TRUE(e == 103 || e - b >= 10) << b << " to " << e;
    total += e - b;
  });
  EXPECT_EQ(total, 103);
}

TEST(ParallelFor, OneGrainRunsInTheCaller) {
  const std::thread::id caller = std::this_thread::get_id();
  parallel_for(0, 10, 10, [&](std::int64_t b, std::int64_t e) {
    EXPECT_EQ(b, 0);
    EXPECT_EQ(e, 10);
    EXPECT_EQ(std::this_thread::get_id(), caller);
  });
}

TEST(ParallelFor, NestedCallsAreSerial) {
  std::atomic<std::int64_t> sum{0};
  parallel_for(0, 64, 1, [&](std::int64_t b, std::int64_t e) {
    const std::thread::id outer = std::this_thread::get_id();
    for (std::int64_t i = b; i < e; ++i) {
      parallel_for(0, 100, 1, [&](std::int64_t inner_b, std::int64_t inner_e) {
        EXPECT_EQ(std::this_thread::get_id(), outer);
        sum += inner_e - inner_b;
      });
    }
  });
  EXPECT_EQ(sum, 6400);
}

TEST(ParallelFor, CallsFromManyThreadsDoNotMix) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        EXPECT_EQ(visits(0, 200, 1), std::vector<int>(200, 1));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

TEST(ParallelFor, RethrowsWhatABodyThrows) {
  for (const std::int64_t thrower : {0, 50, 99}) {
    const auto body = [&](std::int64_t b, std::int64_t e) {
      if (b <= thrower && thrower < e) throw std::runtime_error("body");
    };
    EXPECT_THROW(parallel_for(0, 100, 1, body), std::runtime_error);
  }
  EXPECT_THROW(
      parallel_for(0, 100, 1, [](std::int64_t, std::int64_t) { throw std::logic_error("all"); }),
      std::logic_error);
  // And is as good as new.
  EXPECT_EQ(visits(0, 100, 1), std::vector<int>(100, 1));
}

int installed_calls = 0;

TEST(ParallelFor, AHostInstallsItsOwn) {
  set_parallel_for(
      [](std::int64_t begin, std::int64_t end, std::int64_t grain, RangeBody body, void* context) {
        ++installed_calls;
        EXPECT_GE(grain, 1);
        body(begin, end, context);
      });
  EXPECT_EQ(visits(0, 100, 0), std::vector<int>(100, 1));
  set_parallel_for(nullptr);
  EXPECT_EQ(installed_calls, 1);
  EXPECT_EQ(visits(0, 100, 1), std::vector<int>(100, 1));
  EXPECT_EQ(installed_calls, 1);
}

}  // namespace
}  // namespace dsa
