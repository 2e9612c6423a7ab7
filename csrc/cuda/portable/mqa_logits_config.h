// SPDX-License-Identifier: Apache-2.0
// The tile of the portable indexer.
#pragma once

#include "cuda/common/mqa_task.h"

namespace dsa::cuda {

struct MqaTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpHeads = 64;  // head rows of a warp, in registers: four m-tiles of 16
  static_assert(kMaxIndexHeads == 2 * kWarpHeads);
  static constexpr int kBlockKeys = 32;  // keys of one step of a warp: four n-tiles of 8
  static constexpr int kBlocks = 2;      // of a tile of keys that the warps of a CTA share
  static constexpr int kKeys = kBlocks * kBlockKeys;
  static_assert(kThreads == kKeys * 4, "four threads bring a key");
};

}  // namespace dsa::cuda
