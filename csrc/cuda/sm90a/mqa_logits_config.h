// SPDX-License-Identifier: Apache-2.0
// Tiles of the Hopper indexer logits, and what a launch works on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/portable/mqa_logits_config.h"
#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::sm90a {

template <int kHeads_, int kDim_>
struct MqaLogitsConfig {
  static constexpr int kHeads = kHeads_;  // columns of a query; heads past the last are zeros
  static constexpr int kDim = kDim_;      // bytes of a row

  // Four keep the tensor cores busiest; what eight queries of 16 heads need fits into three.
  static constexpr int kMathWarpgroups = kHeads == 16 ? 3 : 4;
  static constexpr int kWarpgroupColumns = 128;  // N of a product
  static constexpr int kWarpgroupQueries = kWarpgroupColumns / kHeads;
  static_assert(kHeads % 16 == 0 && kWarpgroupQueries >= 1, "16 columns are of one query");
  static constexpr int kColumns = kMathWarpgroups * kWarpgroupColumns;
  static constexpr int kQueries = kColumns / kHeads;

  static constexpr int kProductKeys = 64;  // M of a product
  static constexpr int kProducts = 2;      // of a warpgroup and tile
  static constexpr int kTileKeys = kProducts * kProductKeys;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = 128 * (kMathWarpgroups + 1);
  // Together what the CTA starts with: 640 * 96 or 512 * 128.
  static constexpr int kMathRegisters = kMathWarpgroups == 4 ? 112 : 152;
  static constexpr int kProducerRegisters = kMathWarpgroups == 4 ? 32 : 56;

  static constexpr int kQueryBytes = kColumns * kDim;
  static constexpr int kKeyBytes = kTileKeys * kDim;
  static constexpr int kQuerySlots = 2;
  static constexpr int kKeyStages =
      std::min(8, (220 * 1024 - kQuerySlots * kQueryBytes) / kKeyBytes);

  // Tiles in a row of a block of queries.
  struct Work {
    std::int32_t first_query;
    std::uint32_t first_key;
    std::int32_t tiles;  // -1: there is no more
    KeyWindow common;    // keys that all of the queries see
  };

  // A CTA's tiles: from tile `skip` of a block on, and on with the next blocks.
  struct Share {
    std::int64_t block;
    std::uint32_t skip;
    std::uint32_t tiles;
  };

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kQuerySlots][kQueryBytes];
    alignas(1024) std::uint8_t k[kKeyStages][kKeyBytes];
    float weights[kQuerySlots][kColumns];
    KeyWindow windows[kQuerySlots][kQueries];
    Work work[kQuerySlots];
    Share share;
    std::uint32_t warp_tiles[kThreads / 32];
    ptx::Mbarrier full_q[kQuerySlots], empty_q[kQuerySlots];
    ptx::Mbarrier full_k[kKeyStages], empty_k[kKeyStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// The keys of a launch, on whole tiles: so few that they stay in L2 while all queries read them.
struct MqaLogitsRange {
  std::uint32_t begin, end;
  std::uint32_t columns_end;  // columns to clean end here, and begin with the keys
};

}  // namespace dsa::cuda::sm90a
