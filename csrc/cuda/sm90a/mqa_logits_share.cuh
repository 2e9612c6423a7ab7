// SPDX-License-Identifier: Apache-2.0
// Which tiles a CTA of the Hopper indexer logits takes: found in the kernel, from the windows.
#pragma once

#include <cstdint>

#include "cuda/ptx/ldst.cuh"
#include "cuda/sm90a/mqa_logits_config.h"

namespace dsa::cuda::sm90a {

// Where a block's rows stand in their group.
template <typename Config>
struct BlockRows {
  std::uint32_t group;
  std::int32_t first;  // in the group
  std::int32_t count;

  template <typename Keys>
  __device__ BlockRows(const MqaTask<Keys>& task, const MqaLogitsRange& range,
                       std::uint32_t block) {
    group = block / range.blocks_per_group;
    first = static_cast<std::int32_t>(block - group * range.blocks_per_group) * Config::kQueries;
    count = min(static_cast<std::int32_t>(task.rows_per_group) - first, Config::kQueries);
  }

  // Among the rows of all groups, of which there are fewer than 2^31.
  template <typename Keys>
  __device__ std::int32_t first_of_all(const MqaTask<Keys>& task) const {
    return static_cast<std::int32_t>(group * static_cast<std::uint32_t>(task.rows_per_group)) +
           first;
  }
};

// The tiles of keys that some query of a block sees.
template <typename Config>
struct BlockTiles {
  std::uint32_t first_key;
  std::uint32_t tiles;

  // Of the hull of the windows, {~0, 0} if all are empty.
  __device__ BlockTiles(KeyWindow hull, const MqaLogitsRange& range) {
    const std::uint32_t begin = max(hull.begin, range.begin);
    const std::uint32_t end = min(hull.end, range.end);
    first_key = begin / Config::kTileKeys * Config::kTileKeys;
    tiles = begin < end ? (end - first_key + Config::kTileKeys - 1) / Config::kTileKeys : 0;
  }
};

// A block's windows, found by a warp.
template <typename Config>
struct BlockWindows {
  KeyWindow window;  // of query `lane`
  KeyWindow common;  // keys that all of them see
  KeyWindow hull;

  template <typename Keys>
  __device__ BlockWindows(const MqaTask<Keys>& task, const BlockRows<Config>& rows, int lane) {
    static_assert(Config::kQueries <= 32);
    const bool is_query = lane < rows.count;
    if (is_query) window = task.keys.window(rows.group, rows.first + lane);
    const bool empty = window.begin >= window.end;
    hull.begin = __reduce_min_sync(~0u, empty ? ~0u : window.begin);
    hull.end = __reduce_max_sync(~0u, empty ? 0u : window.end);
    common.begin = __reduce_max_sync(~0u, is_query ? window.begin : 0u);
    common.end = __reduce_min_sync(~0u, is_query ? window.end : ~0u);
  }
};

// The same by one thread: only how many tiles.
template <typename Config, typename Keys>
__device__ std::uint32_t count_tiles(const MqaTask<Keys>& task, const MqaLogitsRange& range,
                                     std::uint32_t block) {
  const BlockRows<Config> rows(task, range, block);
  KeyWindow hull{~0u, 0u};
#pragma unroll(Keys::kMayMiss ? 1 : 4)
  for (int i = 0; i < rows.count; ++i) {
    const KeyWindow window = task.keys.window(rows.group, rows.first + i);
    if (window.begin >= window.end) continue;
    hull.begin = min(hull.begin, window.begin);
    hull.end = max(hull.end, window.end);
  }
  return BlockTiles<Config>(hull, range).tiles;
}

// This CTA's part of `total` tiles, of which all CTAs take equally many; in 32 bits, since it
// stands before a CTA's first copy (core/split_schedule.h's flat_begin divides in 64).
struct Portion {
  std::uint32_t begin, count;

  __device__ explicit Portion(std::uint32_t total) {
    const std::uint32_t least = total / gridDim.x;
    const std::uint32_t more = total - least * gridDim.x;  // CTAs that have one more
    begin = blockIdx.x * least + min(blockIdx.x, more);
    count = least + (blockIdx.x < more ? 1 : 0);
  }
};

__device__ inline std::uint32_t warp_inclusive_sum(std::uint32_t x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::uint32_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Finds this CTA's share, into shared memory. By all threads.
template <typename Config, typename Keys>
__device__ void find_share(typename Config::SharedStorage& shared, const MqaTask<Keys>& task,
                           const MqaLogitsRange& range) {
  constexpr int kWarps = Config::kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::uint32_t each = (range.blocks + Config::kThreads - 1) / Config::kThreads;
  const std::uint32_t begin = min(threadIdx.x * each, range.blocks);
  const std::uint32_t end = min(begin + each, range.blocks);
  std::uint32_t mine = 0;
  for (std::uint32_t block = begin; block < end; ++block) {
    mine += count_tiles<Config>(task, range, block);
  }
  std::uint32_t before = warp_inclusive_sum(mine, lane);
  if (lane == 31) shared.warp_tiles[warp] = before;
  if (threadIdx.x == 0) shared.share = {};
  __syncthreads();
  const std::uint32_t of_warp = lane < kWarps ? shared.warp_tiles[lane] : 0;
  const std::uint32_t total = __reduce_add_sync(~0u, of_warp);
  before += __reduce_add_sync(~0u, lane < warp ? of_warp : 0) - mine;

  const Portion portion(total);
  if (portion.begin >= before && portion.begin < before + mine) {
    std::uint32_t skip = portion.begin - before;
    std::uint32_t block = begin;
    for (; block + 1 < end; ++block) {
      const std::uint32_t tiles = count_tiles<Config>(task, range, block);
      if (skip < tiles) break;
      skip -= tiles;
    }
    shared.share = {block, skip, portion.count};
  }
}

// The same by a warp, for up to 32 blocks.
template <typename Config, typename Keys>
__device__ typename Config::Share find_share_of_few(const MqaTask<Keys>& task,
                                                    const MqaLogitsRange& range) {
  const int lane = threadIdx.x % 32;
  const auto block = static_cast<std::uint32_t>(lane);
  const std::uint32_t mine = block < range.blocks ? count_tiles<Config>(task, range, block) : 0;
  const std::uint32_t until = warp_inclusive_sum(mine, lane);
  const std::uint32_t total = __shfl_sync(~0u, until, 31);
  const Portion portion(total);
  const unsigned begins_here = __ballot_sync(~0u, portion.begin < until);
  if (begins_here == 0) return {};
  const int first = __ffs(static_cast<int>(begins_here)) - 1;
  const std::uint32_t before = __shfl_sync(~0u, until - mine, first);
  return {static_cast<std::uint32_t>(first), portion.begin - before, portion.count};
}

// Into L2, while the CTAs find their shares: what they look up next.
template <typename Config>
__device__ void prefetch_tables(const MqaTask<PagedKeys>& task, const MqaLogitsRange& range) {
  if (range.end == 0) return;
  constexpr std::uint32_t kLine = 128 / sizeof(std::int32_t);
  // Of a request.
  const std::uint32_t lines = task.keys.page_size.quotient_of_31_bits(range.end - 1) / kLine + 1;
  const std::uint32_t line = blockIdx.x * Config::kThreads + threadIdx.x;
  const std::uint32_t request = line / lines;
  if (request < task.num_groups) {
    ptx::prefetch_l2(task.keys.table + request * task.keys.table_stride +
                     (line - request * lines) * kLine);
  }
}

}  // namespace dsa::cuda::sm90a
