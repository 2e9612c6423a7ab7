// SPDX-License-Identifier: Apache-2.0
// Tiles of the Hopper indexer logits, and what a launch works on.
#pragma once

#include <cstdint>

#include "cuda/portable/mqa_logits_config.h"
#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::sm90a {

template <int kHeads_, int kDim_>
struct MqaLogitsConfig {
  static constexpr int kHeads = kHeads_;  // columns of a query; heads past the last are zeros
  static constexpr int kDim = kDim_;      // bytes of a row
  static constexpr int kColumns = 256;    // N of the product
  static constexpr int kQueries = kColumns / kHeads;
  static_assert(kHeads % 16 == 0 && kQueries >= 2, "16 columns are of one query");

  static constexpr int kMathWarpgroups = 2;
  static constexpr int kWarpgroupKeys = 64;  // M of the product
  static constexpr int kTileKeys = kMathWarpgroups * kWarpgroupKeys;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = 128 * (kMathWarpgroups + 1);
  // 64512 of an SM's 65536: 2 * 128 * 232 + 128 * 40.
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  static constexpr int kQueryBytes = kColumns * kDim;
  static constexpr int kKeyBytes = kTileKeys * kDim;
  static constexpr int kQuerySlots = 2;
  static constexpr int kKeyStages = 8;

  // A block of queries and the tiles of one chunk of keys.
  struct Work {
    std::int32_t first_query;
    std::uint32_t first_key;
    std::int32_t tiles;  // -1: there is no more
    KeyWindow common;    // keys that all of the queries see
  };

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kQuerySlots][kQueryBytes];
    alignas(1024) std::uint8_t k[kKeyStages][kKeyBytes];
    float weights[kQuerySlots][kColumns];
    KeyWindow windows[kQuerySlots][kQueries];
    Work work[kQuerySlots];
    ptx::Mbarrier full_q[kQuerySlots], empty_q[kQuerySlots];
    ptx::Mbarrier full_k[kKeyStages], empty_k[kKeyStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// CTAs take pairs (block of queries, chunk of keys), all blocks of a chunk before the next chunk.
struct MqaLogitsSchedule {
  std::uint32_t query_blocks;
  std::uint32_t pairs;  // below 2^31
  std::uint32_t chunk_keys;
};

}  // namespace dsa::cuda::sm90a
