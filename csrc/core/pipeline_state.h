// SPDX-License-Identifier: Apache-2.0
// Position in a ring of kNumStages shared-memory stages, each with a full and an empty mbarrier.
//
// An mbarrier has a phase that flips each time all its arrivals are in; wait(barrier, parity)
// blocks until the phase of that parity has completed, and a fresh barrier counts as having
// completed parity 1. Hence the canonical rule:
//   consumer: starts at phase 0, waits for full[index] at `phase`: blocks until stage 0 is filled;
//   producer: starts at phase 1, waits for empty[index] at `phase`: passes for one lap, all stages
//     being free.
// Both advance once a stage; the phase flips whenever the index wraps. Producer and consumer are
// in step when their indices agree and their phases differ.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa {

template <int kNumStages>
struct PipelineState {
  static_assert(kNumStages >= 1);
  static constexpr std::uint32_t kStages = kNumStages;

  std::uint32_t index = 0;
  std::uint32_t phase = 0;  // 0 or 1: the parity to wait for

  DSA_HOST_DEVICE static constexpr PipelineState consumer_start() { return {0, 0}; }
  DSA_HOST_DEVICE static constexpr PipelineState producer_start() { return {0, 1}; }

  DSA_HOST_DEVICE constexpr void advance() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1u;
    }
  }

  DSA_HOST_DEVICE constexpr void advance(std::uint32_t count) {
    // The index is added after the division, so that no count overflows.
    const std::uint32_t sum = index + count % kStages;
    const std::uint32_t wraps = count / kStages + (sum >= kStages ? 1u : 0u);
    index = sum >= kStages ? sum - kStages : sum;
    phase ^= wraps & 1u;
  }

  DSA_HOST_DEVICE friend constexpr bool operator==(const PipelineState& a, const PipelineState& b) {
    return a.index == b.index && a.phase == b.phase;
  }
};

}  // namespace dsa
