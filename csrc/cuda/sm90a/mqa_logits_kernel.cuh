// SPDX-License-Identifier: Apache-2.0
// Indexer logits on Hopper: out[query, key] = scale[key] * sum over heads of weight * relu(q . k).
//
// Tile       D [keys, columns] = K Q^T, e4m3. A column is a head of a query, a row a key, so that a
//            thread sums over heads in registers. 128 keys by 512 columns: 512 / kHeads queries.
// Warpgroups 0 to 3 (0 to 2 for 16 heads): math, 128 columns each, in two products of 64 keys.
// While
//            one warpgroup sums, the products of the others run. The last: producer. Its warp 0
//            copies queries and keys, warp 1 stages weights and windows, warps 2 and 3 write -inf
//            to what no tile covers.
// Registers  math 112: 64 of D, 32 of weights; producer 32.
// Shared     q 2 x 64 KiB, k 5 x 16 KiB (D = 128).
// Barriers   full_q: warp 0's expect, warp 1, and the bytes of q. empty_q: all math warps.
//            full_k: warp 0's expect and bytes. empty_k: all math warps.
// Grid       a CTA an SM; of all tiles, block of queries after block, each takes an equal share.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "core/pipeline_state.h"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
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

// This CTA's part of `total` tiles, of which all CTAs take equally many.
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

template <typename Config, typename Keys>
class MqaLogitsProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Task = MqaTask<Keys>;
  using Share = typename Config::Share;

  __device__ MqaLogitsProducer(SharedStorage& shared, const Task& task, const MqaLogitsRange& range,
                               const CUtensorMap& q_map, const CUtensorMap& k_map, Share share)
      : shared_(shared),
        task_(task),
        range_(range),
        q_map_(q_map),
        k_map_(k_map),
        share_(share),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    switch (threadIdx.x / 32 % 4) {
      case 0: copy(); break;
      case 1: stage_weights(); break;
      default:
        if (task_.clean) clean();
    }
  }

 private:
  using QuerySlot = PipelineState<Config::kQuerySlots>;

  // Calls visit(slot, rows, windows, first_key, tiles) for each block of this CTA's share, then
  // ends; in the ring of query slots.
  template <typename Visit, typename End>
  __device__ void for_each_block(Visit&& visit, End&& end) {
    auto slot = QuerySlot::producer_start();
    auto [block, skip, left] = share_;
    for (; left > 0; ++block, skip = 0) {
      const BlockRows<Config> rows(task_, range_, block);
      const BlockWindows<Config> windows(task_, rows, lane_);
      const BlockTiles<Config> of_block(windows.hull, range_);
      const std::uint32_t tiles = min(of_block.tiles - skip, left);
      if (tiles == 0) continue;
      left -= tiles;
      ptx::mbarrier_wait(shared_.empty_q[slot.index], slot.phase);
      visit(slot.index, rows, windows, of_block.first_key + skip * Config::kTileKeys, tiles);
      __syncwarp();
      slot.advance();
    }
    ptx::mbarrier_wait(shared_.empty_q[slot.index], slot.phase);
    if (lane_ == 0) end(slot.index);
  }

  __device__ void copy() {
    for_each_block(
        [&](std::uint32_t slot, const BlockRows<Config>& rows, const BlockWindows<Config>& windows,
            std::uint32_t first_key, std::uint32_t tiles) {
          if (lane_ == 0) {
            shared_.work[slot] = {rows.first_of_all(task_), rows.count, first_key,
                                  static_cast<std::int32_t>(tiles), windows.common};
            ptx::mbarrier_arrive_expect(shared_.full_q[slot], Config::kQueryBytes);
            ptx::tma_load(shared_.q[slot], q_map_, shared_.full_q[slot], 0, 0, rows.first,
                          static_cast<std::int32_t>(rows.group));
          }
          if constexpr (Keys::kMayMiss) {
            copy_pages(rows.group, first_key, windows.hull.end, tiles);
          } else if (lane_ == 0) {
            copy_keys(first_key, tiles);
          }
        },
        [&](std::uint32_t slot) {
          shared_.work[slot].tiles = -1;
          ptx::mbarrier_arrive(shared_.full_q[slot]);
        });
  }

  __device__ void copy_keys(std::uint32_t first_key, std::uint32_t tiles) {
#pragma unroll 1
    for (std::uint32_t tile = 0; tile < tiles; ++tile) {
      ptx::mbarrier_wait(shared_.empty_k[stage_.index], stage_.phase);
      ptx::mbarrier_arrive_expect(shared_.full_k[stage_.index], Config::kKeyBytes);
      ptx::tma_load(shared_.k[stage_.index], k_map_, shared_.full_k[stage_.index], 0,
                    static_cast<std::int32_t>(first_key + tile * Config::kTileKeys));
      stage_.advance();
    }
  }

  // A lane copies a box of a tile's keys and their scales. 32 boxes, of several tiles, are looked
  // up together, and the next 32 before these are copied.
  __device__ void copy_pages(std::uint32_t group, std::uint32_t first_key, std::uint32_t end,
                             std::uint32_t tiles) {
    const std::uint32_t box_keys = 1u << range_.box_keys_log2;
    const std::uint32_t boxes = Config::kTileKeys >> range_.box_keys_log2;  // of a tile
    std::uint32_t key = first_key + lane_ * box_keys;                       // of what is ahead
    std::int32_t ahead = key < end ? task_.keys.look_up(group, key) : -1;
    std::int32_t page = -1;
#pragma unroll 1
    for (std::uint32_t box = 0; tiles > 0; --tiles, box = (box + boxes) % 32) {
      if (box == 0) {
        page = ahead;
        key += 32 * box_keys;
        ahead = key < end ? task_.keys.look_up(group, key) : -1;
      }
      const bool is_of_tile = lane_ - box < boxes;
      const bool is_mapped = is_of_tile && page >= 0 && page < task_.keys.num_pages;
      const std::uint32_t missing = __ballot_sync(~0u, is_of_tile && !is_mapped);
      ptx::Mbarrier& full = shared_.full_k[stage_.index];
      ptx::mbarrier_wait(shared_.empty_k[stage_.index], stage_.phase);
      if (lane_ == 0) {
        shared_.missing[stage_.index] = missing >> box;
        ptx::mbarrier_arrive_expect(
            full, (boxes - __popc(missing)) * box_keys * (Config::kDim + Config::kScaleBytes));
      }
      __syncwarp();
      if (is_mapped) {
        const std::uint32_t row = (lane_ - box) * box_keys;
        const std::uint32_t token = task_.keys.token_of_page(key - 32 * box_keys);
        ptx::tma_load_once(shared_.k[stage_.index] + row * Config::kDim, k_map_, full, 0,
                           static_cast<std::int32_t>(token), page);
        ptx::bulk_load_once(&shared_.scales[stage_.index][row], task_.keys.scale(page, token),
                            Config::kScaleBytes * box_keys, full);
      }
      stage_.advance();
    }
  }

  __device__ void stage_weights() {
    for_each_block(
        [&](std::uint32_t slot, const BlockRows<Config>& rows, const BlockWindows<Config>& windows,
            std::uint32_t, std::uint32_t) {
          if (lane_ < Config::kQueries) shared_.windows[slot][lane_] = windows.window;
          const std::int64_t first_row = rows.first_of_all(task_);
#pragma unroll 4
          for (int column = lane_; column < Config::kColumns; column += 32) {
            const int row = column / Config::kHeads;
            const int head = column % Config::kHeads;
            shared_.weights[slot][column] =
                row < rows.count && head < task_.num_heads
                    ? task_.weights[(first_row + row) * task_.weights_stride + head]
                    : 0.0f;
          }
          __syncwarp();
          if (lane_ == 0) ptx::mbarrier_arrive(shared_.full_q[slot]);
        },
        [&](std::uint32_t slot) { ptx::mbarrier_arrive(shared_.full_q[slot]); });
  }

  // -inf to what no tile covers; runs of a block's columns go round the CTAs. By warps 2 and 3.
  __device__ void clean() {
    const std::uint32_t runs = (range_.columns_end - range_.begin + kCleanRun - 1) / kCleanRun;
#pragma unroll 1
    for (std::uint32_t item = blockIdx.x; item < range_.blocks * runs; item += gridDim.x) {
      const std::uint32_t block = item / runs;
      const std::uint32_t begin = range_.begin + (item - block * runs) * kCleanRun;
      const std::uint32_t end = min(begin + kCleanRun, range_.columns_end);
      const BlockRows<Config> rows(task_, range_, block);
      const BlockWindows<Config> windows(task_, rows, lane_);
      const BlockTiles<Config> of_block(windows.hull, range_);
      // What is written elsewhere: the window, or the tiles.
      std::uint32_t skip_begin = 0, skip_end = windows.window.end - windows.window.begin;
      if (!task_.columns_are_relative) {
        skip_begin = of_block.first_key;
        skip_end = skip_begin + of_block.tiles * Config::kTileKeys;
      }
#pragma unroll 1
      for (int i = 0; i < 2 * rows.count; ++i) {
        const std::uint32_t row_skip_end = __shfl_sync(~0u, skip_end, i / 2);
        fill(rows.first_of_all(task_) + i / 2, i % 2 == 0 ? begin : max(row_skip_end, begin),
             i % 2 == 0 ? min(skip_begin, end) : end);
      }
    }
  }

  // -inf to columns of a row, 16 bytes a store where the row allows it.
  __device__ void fill(std::int64_t row, std::uint32_t begin, std::uint32_t end) {
    if (begin >= end) return;
    const int log2_size = task_.out_is_bf16 ? 1 : 2;
    std::uint8_t* out =
        static_cast<std::uint8_t*>(task_.out) + (row * task_.out_stride << log2_size);
    const std::uint32_t word = task_.out_is_bf16 ? 0xFF80'FF80u : 0xFF80'0000u;
    const auto store_half = [&](std::uint8_t* at) {
      const bool is_upper = (reinterpret_cast<std::uintptr_t>(at) & 2) != 0;
      *reinterpret_cast<std::uint16_t*>(at) =
          static_cast<std::uint16_t>(is_upper ? word >> 16 : word);
    };
    std::uint8_t* const last = out + (std::int64_t{end} << log2_size);
    out += std::int64_t{begin} << log2_size;
    const auto head =
        static_cast<std::uint32_t>(-reinterpret_cast<std::uintptr_t>(out)) % kVectorBytes;
    const std::uint32_t thread = threadIdx.x % 64;
    if (2 * thread < head && out + 2 * thread < last) store_half(out + 2 * thread);
    out += head + thread * kVectorBytes;
#pragma unroll 1
    for (; out + kVectorBytes <= last; out += 64 * kVectorBytes) {
      *reinterpret_cast<uint4*>(out) = make_uint4(word, word, word, word);
    }
#pragma unroll 1
    for (; out < last; out += 2) store_half(out);  // less than a vector, by one thread
  }

  SharedStorage& shared_;
  const Task& task_;
  const MqaLogitsRange& range_;
  const CUtensorMap& q_map_;
  const CUtensorMap& k_map_;
  Share share_;
  int lane_;
  PipelineState<Config::kKeyStages> stage_ = PipelineState<Config::kKeyStages>::producer_start();
};

template <typename Config, typename Keys>
class MqaLogitsMath {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Task = MqaTask<Keys>;
  using Work = typename Config::Work;

  __device__ MqaLogitsMath(SharedStorage& shared, const Task& task, const MqaLogitsRange& range)
      : shared_(shared),
        task_(task),
        range_(range),
        // The same in all lanes, and known to be.
        warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)),
        lane_(threadIdx.x % 32),
        k_(Descriptor(shared.k) + warpgroup_ / Config::kColumnGroups * kGroupBytes) {}

  __device__ void run() {
    auto slot = PipelineState<Config::kQuerySlots>::consumer_start();
    auto stage = KeyStage::consumer_start();
    while (true) {
      ptx::mbarrier_wait(shared_.full_q[slot.index], slot.phase);
      const Work work = shared_.work[slot.index];
      const int tiles = __shfl_sync(~0u, work.tiles, 0);
      if (tiles < 0) break;
      run_tiles(work, tiles, slot.index, stage);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_q[slot.index]);
      slot.advance();
    }
  }

 private:
  using KeyStage = PipelineState<Config::kKeyStages>;
  using Descriptor = ptx::WgmmaDescriptor<Config::kDim>;
  static constexpr int kGroupBytes = Config::kGroupKeys * Config::kDim;
  static constexpr int kProductBytes = Config::kProductKeys * Config::kDim;
  static constexpr int kWgQueries = Config::kWarpgroupQueries;
  static constexpr int kAccumulators = Config::kWarpgroupColumns / 2;  // of a thread
  static constexpr int kWeights = Config::kWarpgroupColumns / 4;
  static constexpr int kPerLane = kWgQueries < 2 ? 1 : kWgQueries / 2;  // logits of a product

  // What a thread keeps from tile to tile.
  struct Place {
    int slot;                   // of the queries
    std::int32_t logits;        // of kPerLane, whose queries there are
    std::uint32_t key;          // of the thread, in the tile's first product
    const std::uint8_t* scale;  // of that key
    void* out;                  // of that key and the thread's first query
  };

  __device__ void run_tiles(const Work& work, int tiles, int slot, KeyStage& stage) {
    load_weights(slot);
    const int first = column_group() * kWgQueries;
    Place at;
    at.slot = slot;
    at.logits = (work.rows - first - query_of_lane(0) + 1) / 2;
    at.key = work.first_key + row_of_tile();
    if constexpr (!Keys::kMayMiss) at.scale = task_.keys.scale + at.key * task_.keys.scale_stride;
    const std::int64_t row = work.first_row + first + query_of_lane(0);
    const std::int64_t logit = row * task_.out_stride + at.key;
    at.out = task_.out_is_bf16 ? static_cast<void*>(static_cast<__nv_bfloat16*>(task_.out) + logit)
                               : static_cast<float*>(task_.out) + logit;
    const Descriptor q =
        Descriptor(shared_.q[slot]) + column_group() * (Config::kWarpgroupColumns * Config::kDim);

    // Tiles that all queries see in full stand between those that some do not. Pages begin at 0.
    int full_begin = 0, full_end = 0;
    if (!task_.columns_are_relative && work.common.end > work.first_key) {
      const std::uint32_t until = work.common.end - work.first_key;
      full_end = __shfl_sync(~0u, min(static_cast<int>(until / Config::kTileKeys), tiles), 0);
    }
    if (!Keys::kMayMiss && work.common.begin > work.first_key) {
      const std::uint32_t before = work.common.begin - work.first_key;
      full_begin = __shfl_sync(
          ~0u, static_cast<int>((before + Config::kTileKeys - 1) / Config::kTileKeys), 0);
    }
    if (task_.out_is_bf16) {
      run_tiles<__nv_bfloat16>(tiles, full_begin, full_end, q, stage, at);
    } else {
      run_tiles<float>(tiles, full_begin, full_end, q, stage, at);
    }
  }

  template <typename Out>
  __device__ void run_tiles(int tiles, int full_begin, int full_end, Descriptor q, KeyStage& stage,
                            Place& at) const {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::mbarrier_wait(shared_.full_k[stage.index], stage.phase);
      std::uint32_t missing = 0;
      if constexpr (Keys::kMayMiss) missing = shared_.missing[stage.index];
      // One branch for all: none between a product's sum and the next product.
      if (tile >= full_begin && tile < full_end && missing == 0) {
        run_tile<Out, true>(q, stage.index, at, 0);
      } else {
        run_tile<Out, false>(q, stage.index, at, missing);
      }
      stage.advance();
      at.key += Config::kTileKeys;
      if constexpr (!Keys::kMayMiss) at.scale += Config::kTileKeys * task_.keys.scale_stride;
      at.out = static_cast<Out*>(at.out) + Config::kTileKeys;
    }
  }

  __device__ int column_group() const { return warpgroup_ % Config::kColumnGroups; }

  // After the sum over a quad, lane 4 g + t has key row g + 8 * (t % 2), and the query t / 2 of
  // each two.
  __device__ std::uint32_t row_of_tile() const {
    return warpgroup_ / Config::kColumnGroups * Config::kGroupKeys + threadIdx.x / 32 % 4 * 16 +
           lane_ % 2 * 8 + lane_ / 4;
  }
  __device__ int query_of_lane(int i) const { return 2 * i + (kWgQueries < 2 ? 0 : lane_ / 2 % 2); }

  // Those of a relu that comes doubled are halved: see sum_heads.
  __device__ void load_weights(int slot) {
    const float* weights = shared_.weights[slot] + column_group() * Config::kWarpgroupColumns;
#pragma unroll
    for (int j = 0; j < kWeights / 2; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&weights[8 * j + lane_ % 4 * 2]);
      weight_[2 * j] = pair.x;
      weight_[2 * j + 1] = 0.5f * pair.y;
    }
  }

  // kIsFull: all queries see all of the tile, and none of it is missing.
  template <typename Out, bool kIsFull>
  __device__ void run_tile(Descriptor q, std::uint32_t stage, const Place& at,
                           std::uint32_t missing) const {
#pragma unroll
    for (int product = 0; product < Config::kProducts; ++product) {
      constexpr int kKeys = Config::kProductKeys;
      float d[kAccumulators];
      multiply(d, k_ + (stage * Config::kKeyBytes + product * kProductBytes), q);
      const std::uint32_t key = at.key + product * kKeys;
      float scale = 0.0f;
      if constexpr (Keys::kMayMiss) {
        scale = shared_.scales[stage][row_of_tile() + product * kKeys];
      } else if (kIsFull || key < task_.keys.num_keys) {
        scale =
            *reinterpret_cast<const float*>(at.scale + product * kKeys * task_.keys.scale_stride);
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_result(d);
      if (product == Config::kProducts - 1) {
        if constexpr (Keys::kMayMiss) __syncwarp();  // all lanes have their scales
        if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_k[stage]);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float logit = sum_heads(d, i) * scale;
        if ((kWgQueries < 2 && lane_ % 4 >= 2) || i >= at.logits) continue;
        const std::int64_t offset = 2 * i * task_.out_stride + product * kKeys;
        Out* out = static_cast<Out*>(at.out) + offset;
        if constexpr (kIsFull) {
          *out = Out(logit);
        } else {
          store(at, i, product, missing, out, logit);
        }
      }
    }
  }

  // Starts d = K Q^T.
  __device__ void multiply(float (&d)[kAccumulators], Descriptor k, Descriptor q) const {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kDim / 32; ++step) {
      ptx::wgmma_e4m3(d, k + step * 32, q + step * 32, step > 0);
    }
    ptx::wgmma_commit();
  }

  // max(x, 0), a NaN stays one: on the integer pipe, at half the rate of a sum.
  __device__ static float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
  }

  // The sum over heads of this lane's key and query of the i-th two queries.
  __device__ __forceinline__ float sum_heads(const float (&d)[kAccumulators], int i) const {
    constexpr int kTogether = kWgQueries < 2 ? 1 : 2;
    constexpr int kColumns = kTogether * Config::kHeads;
    float sums[kTogether][2] = {};  // [query][row] of this lane's columns
#pragma unroll
    for (int eight = 0; eight < kColumns / 8; ++eight) {
      float (&sum)[2] = sums[8 * eight / Config::kHeads];
      const int j = i * (kColumns / 8) + eight;
      // For every other column relu(x) is x + |x|, doubled, on the pipe of the products; for the
      // rest max(x, 0), beside it.
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float x = d[4 * j + 2 * row], y = d[4 * j + 2 * row + 1];
        sum[row] = fmaf(relu(x), weight_[2 * j], sum[row]);
        sum[row] = fmaf(y + fabsf(y), weight_[2 * j + 1], sum[row]);
      }
    }
    float half[kTogether];
#pragma unroll
    for (int query = 0; query < kTogether; ++query) {
      half[query] = sum_lanes(sums[query][0], sums[query][1], 1);
    }
    if constexpr (kTogether == 1) {
      return half[0] + __shfl_xor_sync(~0u, half[0], 2);
    } else {
      return sum_lanes(half[0], half[1], 2);
    }
  }

  // The sum of two lanes that differ in the bit: of `a` where it is clear, of `b` where it is set.
  __device__ float sum_lanes(float a, float b, int bit) const {
    const bool is_set = (lane_ & bit) != 0;
    return (is_set ? b : a) + __shfl_xor_sync(~0u, is_set ? a : b, bit);
  }

  // Where a window ends or keys are missing.
  template <typename Out>
  __device__ void store(const Place& at, int i, int product, std::uint32_t missing, Out* out,
                        float logit) const {
    const std::uint32_t key = at.key + product * Config::kProductKeys;
    const KeyWindow window =
        shared_.windows[at.slot][column_group() * kWgQueries + query_of_lane(i)];
    if (key >= window.begin && key < window.end) {
      if (task_.columns_are_relative) out -= window.begin;
      if constexpr (Keys::kMayMiss) {
        const std::uint32_t box =
            (row_of_tile() + product * Config::kProductKeys) >> range_.box_keys_log2;
        if ((missing >> box & 1u) != 0) logit = -INFINITY;
      }
    } else {
      if (!task_.clean || task_.columns_are_relative || key >= task_.columns) return;
      logit = -INFINITY;
    }
    *out = Out(logit);
  }

  SharedStorage& shared_;
  const Task& task_;
  const MqaLogitsRange& range_;
  int warpgroup_, lane_;
  Descriptor k_;  // of the warpgroup's keys in the first stage
  float weight_[kWeights];
};

template <typename Config, typename Keys>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_mqa_logits_kernel(const __grid_constant__ MqaTask<Keys> task,
                            const __grid_constant__ MqaLogitsRange range,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(q_map);
    ptx::prefetch_tensor_map(k_map);
    for (int i = 0; i < Config::kQuerySlots; ++i) {
      ptx::mbarrier_init(shared.full_q[i], 2);
      ptx::mbarrier_init(shared.empty_q[i], Config::kMathWarps);
    }
    for (int i = 0; i < Config::kKeyStages; ++i) {
      ptx::mbarrier_init(shared.full_k[i], 1);
      ptx::mbarrier_init(shared.empty_k[i], Config::kMathWarps);
    }
    ptx::mbarrier_fence_init();
  }
  if constexpr (Keys::kMayMiss) prefetch_tables<Config>(task, range);
  const bool is_producer = threadIdx.x / 128 == Config::kMathWarpgroups;
  typename Config::Share share{};
  if (range.blocks > 32) {
    find_share<Config>(shared, task, range);
  } else if (is_producer) {
    share = find_share_of_few<Config>(task, range);
  }
  __syncthreads();
  if (is_producer) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    if (range.blocks > 32) share = shared.share;
    MqaLogitsProducer<Config, Keys>(shared, task, range, q_map, k_map, share).run();
  } else {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    MqaLogitsMath<Config, Keys>(shared, task, range).run();
  }
}

}  // namespace dsa::cuda::sm90a
