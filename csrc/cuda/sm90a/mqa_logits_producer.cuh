// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the Hopper indexer logits: copies, weights, and -inf beside the tiles.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"
#include "cuda/sm90a/mqa_logits_share.cuh"

namespace dsa::cuda::sm90a {

// Of tails; a launch's is at zero before and after it.
static __device__ std::uint32_t mqa_logits_tickets[kLaunchCounters];

template <typename Config, typename Keys>
class MqaLogitsProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Task = MqaTask<Keys>;

  __device__ MqaLogitsProducer(SharedStorage& shared, const Task& task, const MqaLogitsRange& range,
                               const CUtensorMap& q_map, const CUtensorMap& k_map)
      : shared_(shared),
        task_(task),
        range_(range),
        q_map_(q_map),
        k_map_(k_map),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    if (range_.blocks > kFewBlocks<Keys>) meet();
    switch (threadIdx.x / 32 % 4) {
      case 0: copy_keys(); break;
      case 1: stage_queries(); break;
      default:
        meet();
        if (task_.clean) clean();
    }
    meet();
  }

 private:
  using TakenSlot = PipelineState<Config::kTakenSlots>;

  // The CTA's first sync, after which its barriers are there: as late as a warp can have it.
  __device__ void meet() {
    if (!met_) ptx::cta_sync();
    met_ = true;
  }

  // Calls visit(rows, begin, end, seen) for each block of a share: its keys, on units, of which its
  // queries see none from `seen` on.
  template <typename Visit>
  __device__ void for_each_block(const MqaLogitsShare& share, Visit&& visit) {
    auto [block, skip, left, hull] = share;
    if (left == 0) return;
    BlockRows<Config> rows(range_, block);
    while (true) {
      if constexpr (Keys::kMayMiss) hull.begin = 0;
      const BlockUnits<Keys> units(hull, range_);
      const std::uint32_t until = min(units.all(), skip + left);
      left -= until - skip;
      const std::uint32_t begin = units.key_at(skip), end = units.key_at(until);
      if (begin < end) visit(rows, begin, end, min(end, hull.end));
      if (left == 0) break;
      rows = BlockRows<Config>(range_, ++block);
      hull = hull_of_lanes<Keys>(window_of_lane(task_, rows, lane_));
      skip = 0;
    }
  }

  __device__ void copy_keys() {
    MqaLogitsShare share = shared_.shares[0];
    auto slot = TakenSlot::producer_start();
    while (true) {
      for_each_block(share, [&](const BlockRows<Config>& rows, std::uint32_t begin, std::uint32_t,
                                std::uint32_t seen) {
        if constexpr (Keys::kMayMiss) {
          copy_pages(rows.group, begin, seen);
        } else {
          meet();
          if (lane_ == 0) copy_tiles(begin, seen);
        }
      });
      if (!has_tail()) break;
      meet();
      share = take_piece();
      ptx::mbarrier_wait(shared_.empty_taken[slot.index], slot.phase);
      __syncwarp();
      if (lane_ == 0) {
        shared_.taken[slot.index] = share;
        ptx::mbarrier_arrive(shared_.full_taken[slot.index]);
      }
      __syncwarp();
      if (share.units == 0) break;
      slot.advance();
    }
  }

  __device__ bool has_tail() const {
    return Config::kHasTail && Tail<Config>(shared_.units, range_).pieces > 0;
  }

  // Of the tail, for the CTA: empty when there are no more.
  __device__ MqaLogitsShare take_piece() {
    const Tail<Config> tail(shared_.units, range_);
    // With every CTA's last, that many tickets are taken, and the counter is at zero again.
    const std::uint32_t tickets = tail.pieces + range_.ctas.divisor();
    std::uint32_t piece = 0;
    if (lane_ == 0) piece = atomicInc(&mqa_logits_tickets[range_.counter], tickets - 1);
    piece = __shfl_sync(~0u, piece, 0);
    if (piece >= tail.pieces) return {};
    BlockPlace from = shared_.tail;
    const MqaLogitsShare share =
        seek<Config>(task_, range_, from, tail.place(piece), tail.units(piece));
    __syncwarp();
    if (lane_ == 0) shared_.tail = from;
    __syncwarp();
    return share;
  }

  __device__ void copy_tiles(std::uint32_t begin, std::uint32_t end) {
#pragma unroll 1
    for (std::uint32_t key = begin; key < end; key += Config::kTileKeys) {
      ptx::mbarrier_wait(shared_.empty_k[stage_.index], stage_.phase);
      ptx::mbarrier_arrive_expect(shared_.full_k[stage_.index], Config::kKeyBytes);
      ptx::tma_load(shared_.k[stage_.index], k_map_, shared_.full_k[stage_.index], 0,
                    static_cast<std::int32_t>(key));
      stage_.advance();
    }
  }

  // A lane copies a box of a tile's keys and their scales. 32 boxes, of several tiles, are looked
  // up together, and the next 32 before these are copied.
  __device__ void copy_pages(std::uint32_t group, std::uint32_t begin, std::uint32_t end) {
    const std::uint32_t box_keys = 1u << range_.box_keys_log2;
    const std::uint32_t boxes = Config::kTileKeys >> range_.box_keys_log2;  // of a tile
    const auto look_up = [&](std::uint32_t key) {
      return key < end ? task_.keys.look_up(group, key) : -1;
    };
    std::uint32_t key = begin + lane_ * box_keys;
    std::int32_t page = look_up(key);
    std::int32_t ahead = look_up(key + 32 * box_keys);
    std::uint32_t box = 0;  // the tile's first of the 32
    meet();
#pragma unroll 1
    for (std::uint32_t tile = begin; tile < end; tile += Config::kTileKeys) {
      if (box == 32) {
        box = 0;
        page = ahead;
        key += 32 * box_keys;
        ahead = look_up(key + 32 * box_keys);
      }
      const std::uint32_t row = (lane_ - box) * box_keys;
      const std::uint32_t token = task_.keys.token_of_page(key);
      const bool is_of_tile = lane_ - box < boxes;
      const bool is_mapped = is_of_tile && page >= 0 && page < task_.keys.num_pages;
      ptx::Mbarrier& full = shared_.full_k[stage_.index];
      ptx::mbarrier_wait(shared_.empty_k[stage_.index], stage_.phase);
      if (is_mapped) {
        ptx::tma_load_once(shared_.k[stage_.index] + row * Config::kDim, k_map_, full, 0,
                           static_cast<std::int32_t>(token), page);
        ptx::bulk_load_once(&shared_.scales[stage_.index][row], task_.keys.scale(page, token),
                            Config::kScaleBytes * box_keys, full);
      }
      // The bytes may come before they are expected: this arrival is the only one.
      const std::uint32_t missing = __ballot_sync(~0u, is_of_tile && !is_mapped);
      if (lane_ == 0) {
        shared_.missing[stage_.index] = missing >> box;
        ptx::mbarrier_arrive_expect(
            full, (boxes - __popc(missing)) * box_keys * (Config::kDim + Config::kScaleBytes));
      }
      stage_.advance();
      box += boxes;
    }
  }

  // Queries, their weights and windows.
  __device__ void stage_queries() {
    auto slot = PipelineState<Config::kQuerySlots>::producer_start();
    const auto free_slot = [&] { ptx::mbarrier_wait(shared_.empty_q[slot.index], slot.phase); };
    meet();
    const auto stage = [&](const BlockRows<Config>& rows, std::uint32_t begin, std::uint32_t end,
                           std::uint32_t) {
      free_slot();
      if (lane_ == 0) {
        ptx::tma_load(shared_.q[slot.index], q_map_, shared_.full_q[slot.index], 0, 0, rows.first,
                      static_cast<std::int32_t>(rows.group));
      }
      const std::int32_t first_row = rows.first_of_all(range_);
#pragma unroll 4
      for (int column = lane_; column < Config::kColumns; column += 32) {
        const int row = column / Config::kHeads;
        const int head = column % Config::kHeads;
        ptx::cp_async_or_zeros<sizeof(float)>(
            ptx::shared_address(&shared_.weights[slot.index][column]),
            task_.weights + (std::int64_t{first_row} + row) * task_.weights_stride + head,
            row < rows.count && head < task_.num_heads);
      }
      ptx::cp_async_commit();
      const KeyWindow window = window_of_lane(task_, rows, lane_);
      if (lane_ < Config::kQueries) shared_.windows[slot.index][lane_] = window;
      const KeyWindow common = common_of_lanes(window, lane_ < rows.count);
      if (lane_ == 0) shared_.work[slot.index] = {first_row, rows.count, begin, end, common};
      ptx::cp_async_wait<0>();
      __syncwarp();
      if (lane_ == 0) {
        ptx::mbarrier_arrive_expect(shared_.full_q[slot.index], Config::kQueryBytes);
      }
      slot.advance();
    };
    MqaLogitsShare share = shared_.shares[1];
    auto taken = TakenSlot::consumer_start();
    while (true) {
      for_each_block(share, stage);
      if (!has_tail()) break;
      ptx::mbarrier_wait(shared_.full_taken[taken.index], taken.phase);
      share = shared_.taken[taken.index];
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_taken[taken.index]);
      if (share.units == 0) break;
      taken.advance();
    }
    free_slot();
    if (lane_ == 0) {
      shared_.work[slot.index] = {};
      ptx::mbarrier_arrive(shared_.full_q[slot.index]);
    }
  }

  // -inf to what no tile covers; runs of a block's columns go round the CTAs. By warps 2 and 3.
  __device__ void clean() {
    const std::uint32_t runs = (range_.columns_end - range_.begin + kCleanRun - 1) / kCleanRun;
#pragma unroll 1
    for (std::uint32_t item = blockIdx.x; item < range_.blocks * runs; item += gridDim.x) {
      const std::uint32_t block = item / runs;
      const std::uint32_t begin = range_.begin + (item - block * runs) * kCleanRun;
      const std::uint32_t end = min(begin + kCleanRun, range_.columns_end);
      const BlockRows<Config> rows(range_, block);
      const KeyWindow window = window_of_lane(task_, rows, lane_);
      const BlockUnits<Keys> units(hull_of_lanes<Keys>(window), range_);
      // What is written elsewhere: the window, or the tiles.
      std::uint32_t skip_begin = 0, skip_end = window.end - window.begin;
      if (!task_.columns_are_relative) {
        skip_begin = units.first_key;
        skip_end = units.end_key();
      }
#pragma unroll 1
      for (int i = 0; i < 2 * rows.count; ++i) {
        const std::uint32_t row_skip_end = __shfl_sync(~0u, skip_end, i / 2);
        fill(rows.first_of_all(range_) + i / 2, i % 2 == 0 ? begin : max(row_skip_end, begin),
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
  int lane_;
  bool met_ = false;
  PipelineState<Config::kKeyStages> stage_ = PipelineState<Config::kKeyStages>::producer_start();
};

}  // namespace dsa::cuda::sm90a
