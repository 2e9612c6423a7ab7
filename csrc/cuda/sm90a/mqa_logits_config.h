// SPDX-License-Identifier: Apache-2.0
// Tiles of the Hopper indexer logits, and what a launch works on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch_counter.h"
#include "cuda/common/mqa_task.h"
#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::sm90a {

// Keys that CTAs share out among them; a tile may end with fewer than it could have.
inline constexpr std::uint32_t kUnitKeys = 64;
// What another block costs a CTA, in units: that many queries to load and, mostly, edges of
// windows.
inline constexpr std::uint32_t kBlockUnits = 2;

// A CTA's part: `units` from unit `skip` of a block on, and on with the next blocks.
struct MqaLogitsShare {
  std::uint32_t block;
  std::uint32_t skip;
  std::uint32_t units;
  KeyWindow hull;  // of the block's windows
};

// A block, and the units of all before it.
struct BlockPlace {
  std::uint32_t block;
  std::uint32_t units;
};

// A warpgroup has kWarpgroupColumns columns of a tile. Warpgroups past kColumnGroups have the same
// columns and other keys.
template <int kHeads_, int kDim_, int kMathWarpgroups_, int kWarpgroupColumns_, int kColumnGroups_>
struct MqaLogitsConfig {
  static constexpr int kHeads = kHeads_;  // columns of a query; heads past the last are zeros
  static constexpr int kDim = kDim_;      // bytes of a row

  static constexpr int kMathWarpgroups = kMathWarpgroups_;
  static constexpr int kWarpgroupColumns = kWarpgroupColumns_;  // N of a product
  static constexpr int kWarpgroupQueries = kWarpgroupColumns / kHeads;
  static_assert(kHeads % 16 == 0 && kWarpgroupQueries >= 1, "16 columns are of one query");
  static constexpr int kColumnGroups = kColumnGroups_;
  static constexpr int kColumns = kColumnGroups * kWarpgroupColumns;
  static constexpr int kQueries = kColumns / kHeads;  // of a block

  static constexpr int kKeyGroups = kMathWarpgroups / kColumnGroups;
  // Bound by bandwidth: with more columns, what pieces of work cost eats up what they gain.
  static constexpr bool kHasTail = kColumns == 64;
  static constexpr int kProductKeys = 64;  // M of a product
  static constexpr int kProducts = kKeyGroups == 4 ? 1 : 2;
  static constexpr int kGroupKeys = kProducts * kProductKeys;  // of a warpgroup and tile
  static constexpr int kTileKeys = kKeyGroups * kGroupKeys;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = 128 * (kMathWarpgroups + 1);
  // Together what the CTA starts with: 640 * 96 or 512 * 128.
  static constexpr int kMathRegisters = kMathWarpgroups == 3       ? 152
                                        : kWarpgroupColumns == 128 ? 112
                                                                   : 104;
  static constexpr int kProducerRegisters = kMathWarpgroups == 3       ? 56
                                            : kWarpgroupColumns == 128 ? 32
                                                                       : 64;

  static constexpr int kQueryBytes = kColumns * kDim;
  static constexpr int kKeyBytes = kTileKeys * kDim;
  static constexpr int kScaleBytes = 4;
  static constexpr int kQuerySlots = 2;
  static constexpr int kTakenSlots = 2;
  static constexpr int kKeyStages =
      std::min(8, (220 * 1024 - kQuerySlots * kQueryBytes) / (kKeyBytes + kTileKeys * kScaleBytes));

  // Keys in a row of a block of queries.
  struct Work {
    std::int32_t first_row;  // of the block among all rows
    std::int32_t rows;       // of the block
    std::uint32_t begin;     // the first key, on a unit
    std::uint32_t end;       // `begin`: there is no more
    KeyWindow common;        // keys that all of the queries see
  };

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kQuerySlots][kQueryBytes];
    alignas(1024) std::uint8_t k[kKeyStages][kKeyBytes];
    alignas(128) float scales[kKeyStages][kTileKeys];  // of paged keys
    std::uint32_t missing[kKeyStages];                 // boxes of paged keys that are in no page
    alignas(16) float weights[kQuerySlots][kColumns];
    KeyWindow windows[kQuerySlots][kQueries];
    Work work[kQuerySlots];
    MqaLogitsShare shares[2];           // the CTA's, for either warp that needs it
    std::uint32_t units;                // of all blocks
    BlockPlace tail;                    // where the blocks' tail may be sought from
    MqaLogitsShare taken[kTakenSlots];  // of the tail
    std::uint32_t warp_units[kThreads / 32];
    ptx::Mbarrier full_q[kQuerySlots], empty_q[kQuerySlots];
    ptx::Mbarrier full_k[kKeyStages], empty_k[kKeyStages];
    ptx::Mbarrier full_taken[kTakenSlots], empty_taken[kTakenSlots];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Prefill: all warpgroups have columns of their own. Four keep the tensor cores busiest; what eight
// queries of 16 heads need fits into three.
template <int kHeads, int kDim, int kMathWarpgroups = kHeads == 16 ? 3 : 4>
using FlatConfig = MqaLogitsConfig<kHeads, kDim, kMathWarpgroups, 128, kMathWarpgroups>;

// The same of few queries and keys, as decode: the warpgroups share 128 columns, so that a CTA
// begins with less to load and more CTAs have work.
template <int kHeads, int kDim>
using FewFlatConfig =
    MqaLogitsConfig<kHeads, kDim, 4, kHeads == 16 ? 64 : 128, kHeads == 16 ? 2 : 1>;

// Decode: as few columns as hold a request's queries, the warpgroups share the keys.
template <int kHeads, int kWarpgroupColumns, int kColumnGroups>
using PagedConfig = MqaLogitsConfig<kHeads, 128, 4, kWarpgroupColumns, kColumnGroups>;

// Columns that a CTA cleans before others take on.
inline constexpr std::uint32_t kCleanRun = 16384;

// What of a task a launch does. Rows come in blocks of kQueries, those of a group in their own.
struct MqaLogitsRange {
  std::uint32_t begin, end;  // of the keys; on whole tiles, but for the last end
  std::uint32_t blocks;
  std::int32_t rows_per_group;
  FastDivisor31 blocks_per_group;
  FastDivisor31 ctas;
  std::uint32_t columns_end;   // columns to clean end here, and begin with the keys
  std::uint32_t counter;       // of the tail's tickets; kLaunchCounters: there is no tail
  std::int32_t box_keys_log2;  // of paged keys: of a copy, all in one page
};

}  // namespace dsa::cuda::sm90a
