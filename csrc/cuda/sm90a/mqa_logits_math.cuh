// SPDX-License-Identifier: Apache-2.0
// The math warpgroups of the Hopper indexer logits: products, sums over heads, stores.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/launch.h"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"

namespace dsa::cuda::sm90a {

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
      const int keys = __shfl_sync(~0u, static_cast<int>(work.end - work.begin), 0);
      if (keys == 0) break;
      if (keys > warpgroup_ / Config::kColumnGroups * Config::kGroupKeys) {
        run_tiles(work, ceil_div(keys, Config::kTileKeys), slot.index, stage);
      } else {  // one tile, none of its keys this warpgroup's
        ptx::mbarrier_wait(shared_.full_k[stage.index], stage.phase);
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_k[stage.index]);
        stage.advance();
      }
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
    at.key = work.begin + row_of_tile();
    if constexpr (!Keys::kMayMiss) at.scale = task_.keys.scale + at.key * task_.keys.scale_stride;
    const std::int64_t row = work.first_row + first + query_of_lane(0);
    const std::int64_t logit = row * task_.out_stride + at.key;
    at.out = task_.out_is_bf16 ? static_cast<void*>(static_cast<__nv_bfloat16*>(task_.out) + logit)
                               : static_cast<float*>(task_.out) + logit;
    const Descriptor q =
        Descriptor(shared_.q[slot]) + column_group() * (Config::kWarpgroupColumns * Config::kDim);

    // Tiles that all queries see in full stand between those that some do not. Pages begin at 0.
    int full_begin = 0, full_end = 0;
    const std::uint32_t common_end = min(work.common.end, work.end);
    if (!task_.columns_are_relative && common_end > work.begin) {
      const std::uint32_t until = common_end - work.begin;
      full_end = __shfl_sync(~0u, static_cast<int>(until / Config::kTileKeys), 0);
    }
    if (!Keys::kMayMiss && work.common.begin > work.begin) {
      const std::uint32_t before = work.common.begin - work.begin;
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
      const bool is_full = tile >= full_begin && tile < full_end && missing == 0;
      if constexpr (Config::kProducts == 1) {
        run_tile<Out>(q, stage.index, at, is_full, missing);
      } else if (is_full) {  // no branch between a product's sum and the next product
        run_tile<Out>(q, stage.index, at, true, missing);
      } else {
        run_tile<Out>(q, stage.index, at, false, missing);
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

  // is_full: all queries see all of the tile, and none of it is missing.
  template <typename Out>
  __device__ __forceinline__ void run_tile(Descriptor q, std::uint32_t stage, const Place& at,
                                           bool is_full, std::uint32_t missing) const {
#pragma unroll
    for (int product = 0; product < Config::kProducts; ++product) {
      constexpr int kKeys = Config::kProductKeys;
      if (!is_full && is_past_end(at, product)) {
        if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_k[stage]);
        break;
      }
      float d[kAccumulators];
      multiply(d, k_ + (stage * Config::kKeyBytes + product * kProductBytes), q);
      const std::uint32_t key = at.key + product * kKeys;
      float scale = 0.0f;
      if constexpr (Keys::kMayMiss) {
        scale = shared_.scales[stage][row_of_tile() + product * kKeys];
      } else if (is_full || key < static_cast<std::uint32_t>(task_.keys.num_keys)) {
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
        if (is_full) {
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
        sum[row] = fmaf(ptx::relu(x), weight_[2 * j], sum[row]);
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

  // Whether all of a product's keys are; the same in all warps, since the end is on a unit.
  __device__ bool is_past_end(const Place& at, int product) const {
    const std::uint32_t first = __shfl_sync(~0u, at.key, 0) + product * Config::kProductKeys;
    return __shfl_sync(~0u, static_cast<int>(first >= shared_.work[at.slot].end), 0) != 0;
  }

  // Where a window or the keys of this CTA end, or keys are missing.
  template <typename Out>
  __device__ void store(const Place& at, int i, int product, std::uint32_t missing, Out* out,
                        float logit) const {
    const std::uint32_t key = at.key + product * Config::kProductKeys;
    if (key >= shared_.work[at.slot].end) return;
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

}  // namespace dsa::cuda::sm90a
