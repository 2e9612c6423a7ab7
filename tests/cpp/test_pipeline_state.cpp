// SPDX-License-Identifier: Apache-2.0
#include "core/pipeline_state.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <limits>

namespace dsa {
namespace {

template <typename T>
class PipelineStateTest : public ::testing::Test {};

template <int kNumStages>
struct Stages {
  static constexpr int value = kNumStages;
};
using StageCounts = ::testing::Types<Stages<1>, Stages<2>, Stages<3>, Stages<4>, Stages<5>,
                                     Stages<6>, Stages<7>, Stages<8>, Stages<13>, Stages<16>>;
TYPED_TEST_SUITE(PipelineStateTest, StageCounts);

constexpr bool wraps_and_flips() {
  auto state = PipelineState<2>::consumer_start();
  state.advance();
  state.advance();
  return state == PipelineState<2>{0, 1};
}
static_assert(wraps_and_flips());

TYPED_TEST(PipelineStateTest, IndexAndPhaseOverManyLaps) {
  constexpr std::uint32_t kStages = TypeParam::value;
  auto consumer = PipelineState<TypeParam::value>::consumer_start();
  auto producer = PipelineState<TypeParam::value>::producer_start();
  for (std::uint32_t step = 0; step < 1000 * kStages; ++step) {
    ASSERT_EQ(consumer.index, step % kStages);
    ASSERT_EQ(consumer.phase, step / kStages % 2);
    ASSERT_EQ(producer.index, consumer.index);
    ASSERT_NE(producer.phase, consumer.phase);
    consumer.advance();
    producer.advance();
  }
}

TYPED_TEST(PipelineStateTest, AdvanceByNIsNAdvances) {
  constexpr std::uint32_t kStages = TypeParam::value;
  for (std::uint32_t start = 0; start < 2 * kStages; ++start) {
    auto stepped = PipelineState<TypeParam::value>::producer_start();
    stepped.advance(start);
    auto jumped = stepped;
    for (std::uint32_t count = 0; count < 5 * kStages; ++count) {
      auto state = jumped;
      state.advance(count);
      ASSERT_EQ(state, stepped) << start << " + " << count;
      stepped.advance();
    }
  }
}

TYPED_TEST(PipelineStateTest, AdvanceByAHugeCount) {
  constexpr std::uint32_t kStages = TypeParam::value;
  constexpr std::uint32_t kCount = std::numeric_limits<std::uint32_t>::max();
  auto state = PipelineState<TypeParam::value>::consumer_start();
  state.advance(kStages - 1);
  state.advance(kCount);
  const std::uint64_t steps = std::uint64_t{kStages} - 1 + kCount;
  EXPECT_EQ(state.index, steps % kStages);
  EXPECT_EQ(state.phase, steps / kStages % 2);
}

// What the hardware does: wait(parity) passes when the phase of that parity has completed.
struct ModelBarrier {
  std::uint32_t completed = 0;
  bool passes(std::uint32_t parity) const { return (completed & 1u) != parity; }
  void arrive() { ++completed; }
};

// Runs a producer and a consumer against model barriers, always as far ahead as the waits let one
// of them: the waits alone must keep the ring from being overrun, read too early, or stuck.
TYPED_TEST(PipelineStateTest, CanonicalRuleNeitherOverrunsNorDeadlocks) {
  constexpr int kStages = TypeParam::value;
  for (const bool producer_first : {true, false}) {
    std::array<ModelBarrier, kStages> full;
    std::array<ModelBarrier, kStages> empty;
    std::array<int, kStages> ring{};
    auto producer = PipelineState<kStages>::producer_start();
    auto consumer = PipelineState<kStages>::consumer_start();
    int produced = 0;
    int consumed = 0;
    const auto produce = [&] {
      if (!empty[producer.index].passes(producer.phase)) return false;
      ring[producer.index] = produced++;
      full[producer.index].arrive();
      producer.advance();
      return true;
    };
    const auto consume = [&] {
      if (!full[consumer.index].passes(consumer.phase)) return false;
      EXPECT_EQ(ring[consumer.index], consumed++);
      empty[consumer.index].arrive();
      consumer.advance();
      return true;
    };
    while (consumed < 10 * kStages) {
      const bool advanced = producer_first ? (produce() || consume()) : (consume() || produce());
      ASSERT_TRUE(advanced) << "deadlock after " << consumed;
      ASSERT_LE(produced - consumed, kStages);
    }
  }
}

}  // namespace
}  // namespace dsa
