// SPDX-License-Identifier: Apache-2.0
// Which keys a CTA of the Hopper indexer logits takes: found in the kernel, from the windows.
//
// CTAs have equally many units, but for the tail. A unit is kUnitKeys keys of a block of queries;
// in prefill a block costs some more, which stand before its keys'. Nothing is copied before:
// chains of dependent instructions are short here, and divisors known to the host.
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

  __device__ BlockRows(const MqaLogitsRange& range, std::uint32_t block) {
    group = range.blocks_per_group.quotient(block);
    first = static_cast<std::int32_t>(block - group * range.blocks_per_group.divisor()) *
            Config::kQueries;
    count = min(range.rows_per_group - first, Config::kQueries);
  }

  // Among the rows of all groups, of which there are fewer than 2^31.
  __device__ std::int32_t first_of_all(const MqaLogitsRange& range) const {
    return static_cast<std::int32_t>(group) * range.rows_per_group + first;
  }
};

// The units of a block, of the hull of its windows.
template <typename Keys>
struct BlockUnits {
  std::uint32_t first_key;
  std::uint32_t cost;  // of the block
  std::uint32_t keys;  // of its keys

  __device__ BlockUnits(KeyWindow hull, const MqaLogitsRange& range) {
    const std::uint32_t begin = max(hull.begin, range.begin);
    const std::uint32_t end = min(hull.end, range.end);
    first_key = begin / kUnitKeys * kUnitKeys;
    keys = begin < end ? (end - first_key + kUnitKeys - 1) / kUnitKeys : 0;
    cost = Keys::kMayMiss || keys == 0 ? 0 : kBlockUnits;
  }

  __device__ std::uint32_t all() const { return cost + keys; }
  // The key at which so many of all have passed.
  __device__ std::uint32_t key_at(std::uint32_t units) const {
    return first_key + (max(units, cost) - cost) * kUnitKeys;
  }
  __device__ std::uint32_t end_key() const { return first_key + keys * kUnitKeys; }
};

// A lane's window of a block, empty past its rows.
template <typename Config, typename Keys>
__device__ KeyWindow window_of_lane(const MqaTask<Keys>& task, const BlockRows<Config>& rows,
                                    int lane) {
  static_assert(Config::kQueries <= 32);
  if (lane >= rows.count) return {};
  return task.keys.window(rows.group, rows.first + lane);
}

// Of what some lane's window has. Paged ones begin at 0.
template <typename Keys>
__device__ KeyWindow hull_of_lanes(KeyWindow window) {
  const bool empty = window.begin >= window.end;
  return {Keys::kMayMiss ? 0u : __reduce_min_sync(~0u, empty ? ~0u : window.begin),
          __reduce_max_sync(~0u, empty ? 0u : window.end)};
}

// What the windows of all rows have.
__device__ inline KeyWindow common_of_lanes(KeyWindow window, bool is_row) {
  return {__reduce_max_sync(~0u, is_row ? window.begin : 0u),
          __reduce_min_sync(~0u, is_row ? window.end : ~0u)};
}

// A block's hull, by one thread.
template <typename Config, typename Keys>
__device__ KeyWindow block_hull(const MqaTask<Keys>& task, const MqaLogitsRange& range,
                                std::uint32_t block) {
  const BlockRows<Config> rows(range, block);
  return task.keys.hull(rows.group, rows.first, rows.count);
}

// This CTA's part of `total` units. A small one of pages is of whole tiles, or of a half or a
// quarter of one: what stands across requests and ends in parts of tiles has more of them.
template <typename Config, typename Keys>
struct Portion {
  static constexpr std::uint32_t kTileUnits = Config::kTileKeys / kUnitKeys;
  static constexpr std::uint32_t kSmall = 16 * kTileUnits;

  std::uint32_t begin, count;

  __device__ Portion(std::uint32_t total, const MqaLogitsRange& range) {
    const std::uint32_t ctas = range.ctas.divisor();
    const std::uint32_t least = range.ctas.quotient(total);
    const std::uint32_t more = total - least * ctas;  // CTAs that have one more
    begin = blockIdx.x * least + min(blockIdx.x, more);
    count = least + (blockIdx.x < more ? 1 : 0);
    if (Keys::kMayMiss && least < kSmall) {
      const std::uint32_t most = least + (more > 0 ? 1 : 0);
      std::uint32_t step = 1;
#pragma unroll
      for (std::uint32_t wider = 1; wider < kTileUnits; wider *= 2) {
        if (most > wider) step = 2 * wider;
      }
      const std::uint32_t each = (most + step - 1) & ~(step - 1);
      begin = min(blockIdx.x * each, total);
      count = min(each, total - begin);
    }
  }
};

// The last units: CTAs take pieces of them when they have done their part, for SMs see unlike
// bandwidth. Large ones first.
template <typename Config>
struct Tail {
  static constexpr std::uint32_t kPart = 8;         // of all units
  static constexpr std::uint32_t kLeastOfCta = 24;  // units, else there is none
  static constexpr std::uint32_t kLarge = 32, kSmall = 8;
  static constexpr std::uint32_t kSmallOfCta = 16;  // units in small ones

  std::uint32_t begin;  // the units before it are shared out equally
  std::uint32_t end;
  std::uint32_t large;   // pieces
  std::uint32_t pieces;  // large and small

  __device__ Tail(std::uint32_t units, const MqaLogitsRange& range)
      : begin(units), end(units), large(0), pieces(0) {
    const std::uint32_t ctas = range.ctas.divisor();
    if (!Config::kHasTail || units < ctas * kLeastOfCta || range.counter == kLaunchCounters) return;
    const std::uint32_t tail = units / kPart;
    begin = units - tail;
    large = (tail - min(tail, ctas * kSmallOfCta)) / kLarge;
    pieces = large + (tail - large * kLarge + kSmall - 1) / kSmall;
  }

  __device__ std::uint32_t place(std::uint32_t piece) const {
    const std::uint32_t before = min(piece, large);
    return begin + before * kLarge + (piece - before) * kSmall;
  }
  __device__ std::uint32_t units(std::uint32_t piece) const {
    return piece < large ? kLarge : min(kSmall, end - place(piece));
  }
};

// Sums of lanes up to each one, over the first `lanes`.
__device__ inline std::uint32_t warp_inclusive_sum(std::uint32_t x, int lane,
                                                   std::uint32_t lanes = 32) {
#pragma unroll 1
  for (std::uint32_t step = 1; step < lanes; step *= 2) {
    const std::uint32_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= static_cast<int>(step)) x += other;
  }
  return x;
}

// The blocks that a thread counts, of which all have equally many.
template <typename Config, typename Keys>
class BlockSpan {
 public:
  __device__ BlockSpan(const MqaTask<Keys>& task, const MqaLogitsRange& range, std::uint32_t thread,
                       std::uint32_t threads)
      : task_(task), range_(range) {
    const std::uint32_t each = (range.blocks + threads - 1) / threads;
    begin_ = min(thread * each, range.blocks);
    end_ = min(begin_ + each, range.blocks);
#pragma unroll(Keys::kMayMiss ? 4 : 1)
    for (std::uint32_t block = begin_; block < end_; ++block) {
      last_ = block_hull<Config>(task, range, block);
      units_ += BlockUnits<Keys>(last_, range).all();
    }
  }

  __device__ std::uint32_t begin() const { return begin_; }
  __device__ std::uint32_t units() const { return units_; }

  // The share of `count` units from unit `skip` of the span, which is in it, on.
  __device__ MqaLogitsShare share(std::uint32_t skip, std::uint32_t count) const {
#pragma unroll 1
    for (std::uint32_t block = begin_; block + 1 < end_; ++block) {
      const KeyWindow hull = block_hull<Config>(task_, range_, block);
      const std::uint32_t units = BlockUnits<Keys>(hull, range_).all();
      if (skip < units) return {block, skip, count, hull};
      skip -= units;
    }
    return {end_ - 1, skip, count, last_};
  }

 private:
  const MqaTask<Keys>& task_;
  const MqaLogitsRange& range_;
  std::uint32_t begin_, end_;
  std::uint32_t units_ = 0;
  KeyWindow last_;  // hull of the last block
};

// Up to so many blocks a warp finds the CTA's share alone.
template <typename Keys>
inline constexpr std::uint32_t kFewBlocks = Keys::kMayMiss ? 128 : 32;

// Finds this CTA's share by a warp, for 1 to kFewBlocks blocks.
template <typename Config, typename Keys>
__device__ void find_share_of_few(typename Config::SharedStorage& shared, int which,
                                  const MqaTask<Keys>& task, const MqaLogitsRange& range) {
  const int lane = threadIdx.x % 32;
  const BlockSpan<Config, Keys> span(task, range, lane, 32);
  const std::uint32_t until = warp_inclusive_sum(span.units(), lane, range.blocks);
  const std::uint32_t units = __shfl_sync(~0u, until, min(range.blocks, 32u) - 1);
  const Portion<Config, Keys> portion(Tail<Config>(units, range).begin, range);
  const std::uint32_t skip = portion.begin - (until - span.units());
  const bool begins_here = skip < span.units() && portion.count > 0;
  if (begins_here) shared.shares[which] = span.share(skip, portion.count);
  if (!__any_sync(~0u, begins_here) && lane == 0) shared.shares[which] = {};
  if (which == 0 && lane == 0) {
    shared.units = units;
    shared.tail = {};
  }
  __syncwarp();
}

// Finds this CTA's share by all threads.
template <typename Config, typename Keys>
__device__ void find_share(typename Config::SharedStorage& shared, const MqaTask<Keys>& task,
                           const MqaLogitsRange& range) {
  constexpr int kWarps = Config::kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const BlockSpan<Config, Keys> span(task, range, threadIdx.x, Config::kThreads);
  const std::uint32_t until = warp_inclusive_sum(span.units(), lane);
  if (lane == 31) shared.warp_units[warp] = until;
  if (threadIdx.x < 2) shared.shares[threadIdx.x] = {};
  __syncthreads();
  const std::uint32_t of_warp = lane < kWarps ? shared.warp_units[lane] : 0;
  const std::uint32_t units = __reduce_add_sync(~0u, of_warp);
  const std::uint32_t before =
      __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + until - span.units();
  const Tail<Config> tail(units, range);
  const Portion<Config, Keys> portion(tail.begin, range);
  if (portion.begin - before < span.units() && portion.count > 0) {
    shared.shares[0] = shared.shares[1] = span.share(portion.begin - before, portion.count);
  }
  if (tail.begin - before < span.units()) shared.tail = {span.begin(), before};
  if (threadIdx.x == 0) shared.units = units;
}

// The share of `count` units from unit `place` of all, which is not before `from`, on. By a warp;
// `from` moves on with it.
template <typename Config, typename Keys>
__device__ MqaLogitsShare seek(const MqaTask<Keys>& task, const MqaLogitsRange& range,
                               BlockPlace& from, std::uint32_t place, std::uint32_t count) {
  const int lane = threadIdx.x % 32;
  while (true) {
    const std::uint32_t block = from.block + lane;
    KeyWindow hull;
    if (block < range.blocks) hull = block_hull<Config>(task, range, block);
    const std::uint32_t mine = BlockUnits<Keys>(hull, range).all();
    const std::uint32_t until = from.units + warp_inclusive_sum(mine, lane);
    const std::uint32_t skip = place - (until - mine);
    const unsigned here = __ballot_sync(~0u, skip < mine);
    if (here != 0) {
      const int owner = __ffs(static_cast<int>(here)) - 1;
      return {from.block + owner,
              __shfl_sync(~0u, skip, owner),
              count,
              {__shfl_sync(~0u, hull.begin, owner), __shfl_sync(~0u, hull.end, owner)}};
    }
    from = {from.block + 32, __shfl_sync(~0u, until, 31)};
  }
}

// Into L2, while the CTAs find their shares: what they look up next. By some threads of a CTA.
__device__ inline void prefetch_tables(const MqaTask<PagedKeys>& task, const MqaLogitsRange& range,
                                       std::uint32_t thread, std::uint32_t threads) {
  if (range.end == 0) return;
  constexpr std::uint32_t kLine = 128 / sizeof(std::int32_t);
  // Of a request.
  const std::uint32_t lines = task.keys.page_size.quotient(range.end - 1) / kLine + 1;
  const std::uint32_t line = blockIdx.x * threads + thread;
  const std::uint32_t request = line / lines;
  if (request < task.num_groups) {
    ptx::prefetch_l2(task.keys.table + request * task.keys.table_stride +
                     (line - request * lines) * kLine);
  }
}

}  // namespace dsa::cuda::sm90a
