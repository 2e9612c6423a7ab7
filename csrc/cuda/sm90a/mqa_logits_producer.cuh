// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the Hopper indexer logits: copies, weights, and -inf beside the tiles.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"
#include "cuda/sm90a/mqa_logits_share.cuh"

namespace dsa::cuda::sm90a {

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

}  // namespace dsa::cuda::sm90a
