// SPDX-License-Identifier: Apache-2.0
// Indexer logits on Hopper: out[query, key] = scale[key] * sum over heads of weight * relu(q . k).
//
// Tile       D [keys, columns] = K Q^T, e4m3. A column is a head of a query: 256 columns are
//            256 / kHeads queries. Keys are rows, so that a thread sums over heads in registers.
// Warpgroups 0 and 1: math, 64 keys each of a tile of 128, in two halves of 128 columns: one half's
//            products run while the other's are summed. 2: producer. Its warp 0 copies queries and
//            keys, warp 1 stages weights and windows, warps 2 and 3 write -inf to what no tile
//            covers.
// Registers  math 232: 128 of D, 64 of weights; producer 40.
// Shared     q 2 x 32 KiB, k 8 x 16 KiB (D = 128).
// Barriers   full_q: warp 0's expect, warp 1, and the bytes of q. empty_q: 8 math warps.
//            full_k: warp 0's expect and bytes. empty_k: 8 math warps.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"

namespace dsa::cuda::sm90a {

// Lane-wise windows of a block's queries, and the tiles of a chunk that any of them touches.
template <typename Config>
struct BlockWindows {
  KeyWindow window;  // of query `lane`
  KeyWindow common;  // keys that all of them see
  std::uint32_t first_key;
  std::int32_t tiles;

  __device__ BlockWindows(const MqaTask<FlatKeys>& task, std::int32_t first_query,
                          std::uint32_t chunk_begin, std::uint32_t chunk_keys, int lane) {
    static_assert(Config::kQueries <= 32);
    const std::int64_t row = std::int64_t{first_query} + lane;
    if (lane < Config::kQueries && row < task.rows_per_group) window = task.keys.window(0, row);
    const bool empty = window.begin >= window.end;
    std::uint32_t begin = __reduce_min_sync(~0u, empty ? ~0u : window.begin);
    std::uint32_t end = __reduce_max_sync(~0u, empty ? 0u : window.end);
    const bool is_query = lane < Config::kQueries;
    common.begin = __reduce_max_sync(~0u, is_query ? window.begin : 0u);
    common.end = __reduce_min_sync(~0u, is_query ? window.end : ~0u);
    begin = max(begin, chunk_begin);
    end = min(end, chunk_begin + chunk_keys);
    first_key = begin / Config::kTileKeys * Config::kTileKeys;
    tiles = begin < end
                ? static_cast<int>((end - first_key + Config::kTileKeys - 1) / Config::kTileKeys)
                : 0;
  }
};

// This CTA's pairs in order: forwards and backwards in turn, which evens out long and short ones.
class PairIterator {
 public:
  __device__ explicit PairIterator(const MqaLogitsSchedule& schedule) : schedule_(schedule) {}

  __device__ bool next() {
    for (; first_ < schedule_.pairs; backwards_ = !backwards_) {
      const std::uint32_t pair = first_ + (backwards_ ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      first_ += gridDim.x;
      if (pair >= schedule_.pairs) continue;
      const std::uint32_t chunk = pair / schedule_.query_blocks;
      query_block = pair - chunk * schedule_.query_blocks;
      chunk_begin = chunk * schedule_.chunk_keys;
      backwards_ = !backwards_;
      return true;
    }
    return false;
  }

  std::uint32_t query_block = 0, chunk_begin = 0;  // of the pair that next() has found

 private:
  const MqaLogitsSchedule& schedule_;
  std::uint32_t first_ = 0;  // pair of the round
  bool backwards_ = false;
};

__device__ __forceinline__ void store_logit(const MqaTask<FlatKeys>& task, std::int64_t row,
                                            std::int64_t column, float value) {
  const std::int64_t at = row * task.out_stride + column;
  if (task.out_is_bf16) {
    static_cast<__nv_bfloat16*>(task.out)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(task.out)[at] = value;
  }
}

template <typename Config>
class MqaLogitsProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  static __device__ void run(SharedStorage& shared, const MqaTask<FlatKeys>& task,
                             const MqaLogitsSchedule& schedule, const CUtensorMap& q_map,
                             const CUtensorMap& k_map) {
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    auto slot = PipelineState<Config::kQuerySlots>::producer_start();
    auto stage = PipelineState<Config::kKeyStages>::producer_start();
    PairIterator pairs(schedule);
    while (pairs.next()) {
      const std::int32_t first_query = pairs.query_block * Config::kQueries;
      const BlockWindows<Config> block(task, first_query, pairs.chunk_begin, schedule.chunk_keys,
                                       lane);
      if (warp >= 2) {
        if (task.clean) clean(task, first_query, block, pairs.chunk_begin, schedule.chunk_keys);
        continue;
      }
      if (block.tiles == 0) continue;
      ptx::mbarrier_wait(shared.empty_q[slot.index], slot.phase);
      if (warp == 1) {
        stage_weights(shared, slot.index, task, first_query, block.window, lane);
      } else if (lane == 0) {
        shared.work[slot.index] = {first_query, block.first_key, block.tiles, block.common};
        ptx::mbarrier_arrive_expect(shared.full_q[slot.index], Config::kQueryBytes);
        ptx::tma_load(shared.q[slot.index], q_map, shared.full_q[slot.index], 0, 0, first_query);
        for (int tile = 0; tile < block.tiles; ++tile) {
          ptx::mbarrier_wait(shared.empty_k[stage.index], stage.phase);
          ptx::mbarrier_arrive_expect(shared.full_k[stage.index], Config::kKeyBytes);
          ptx::tma_load(shared.k[stage.index], k_map, shared.full_k[stage.index], 0,
                        static_cast<std::int32_t>(block.first_key + tile * Config::kTileKeys));
          stage.advance();
        }
      }
      __syncwarp();
      slot.advance();
    }
    if (warp < 2 && lane == 0) {
      ptx::mbarrier_wait(shared.empty_q[slot.index], slot.phase);
      if (warp == 0) shared.work[slot.index].tiles = -1;
      ptx::mbarrier_arrive(shared.full_q[slot.index]);
    }
  }

 private:
  static __device__ void stage_weights(SharedStorage& shared, int slot,
                                       const MqaTask<FlatKeys>& task, std::int32_t first_query,
                                       KeyWindow window, int lane) {
    if (lane < Config::kQueries) shared.windows[slot][lane] = window;
#pragma unroll
    for (int column = lane; column < Config::kColumns; column += 32) {
      const std::int32_t row = first_query + column / Config::kHeads;
      const int head = column % Config::kHeads;
      const bool is_head = row < task.rows_per_group && head < task.num_heads;
      shared.weights[slot][column] =
          is_head ? task.weights[row * task.weights_stride + head] : 0.0f;
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(shared.full_q[slot]);
  }

  // -inf to the chunk's columns that no tile covers. By warps 2 and 3.
  static __device__ void clean(const MqaTask<FlatKeys>& task, std::int32_t first_query,
                               const BlockWindows<Config>& block, std::uint32_t chunk_begin,
                               std::uint32_t chunk_keys) {
    // Columns number fewer than 2^31.
    const std::uint32_t end =
        min(static_cast<std::uint32_t>(task.columns), chunk_begin + chunk_keys);
    for (int i = 0; i < Config::kQueries && first_query + i < task.rows_per_group; ++i) {
      // What is written elsewhere: the window, or the tiles.
      std::uint32_t skip_begin = 0;
      std::uint32_t skip_end =
          __shfl_sync(~0u, block.window.end, i) - __shfl_sync(~0u, block.window.begin, i);
      if (!task.columns_are_relative) {
        skip_begin = block.first_key;
        skip_end = skip_begin + block.tiles * Config::kTileKeys;
      }
      for (std::uint32_t c = chunk_begin + threadIdx.x % 64; c < end; c += 64) {
        if (c >= skip_begin && c < skip_end) continue;
        store_logit(task, first_query + i, c, -__builtin_huge_valf());
      }
    }
  }
};

template <typename Config>
class MqaLogitsMath {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Work = typename Config::Work;

  __device__ MqaLogitsMath(SharedStorage& shared, const MqaTask<FlatKeys>& task)
      : shared_(shared),
        task_(task),
        // The same in all lanes, and known to be.
        warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    auto slot = PipelineState<Config::kQuerySlots>::consumer_start();
    auto stage = KeyStage::consumer_start();
    while (true) {
      ptx::mbarrier_wait(shared_.full_q[slot.index], slot.phase);
      const Work work = shared_.work[slot.index];
      if (work.tiles < 0) break;
      load_weights(slot.index);
      const std::uint8_t* q = shared_.q[slot.index];

      Tile tile(*this, work, slot.index);
      int left = work.tiles;
      for (; left >= kUnroll; left -= kUnroll) run_tiles<kUnroll>(q, stage, tile);
      for (; left > 0; --left) run_tiles<1>(q, stage, tile);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_q[slot.index]);
      slot.advance();
    }
  }

 private:
  using KeyStage = PipelineState<Config::kKeyStages>;
  static constexpr int kUnroll = 2;
  // Half of the columns at a time.
  static constexpr int kHalfColumns = Config::kColumns / 2;
  static constexpr int kHalfBytes = kHalfColumns * Config::kDim;
  static constexpr int kHalfQueries = Config::kQueries / 2;
  static constexpr int kWeights = kHalfColumns / 4;  // of a thread
  static constexpr int kSums = 2 * kHalfQueries;     // [query][row], before the quad's sum
  static constexpr int kPerLane = kSums < 4 ? 1 : kSums / 4;

  // Where this thread is among the keys of a pair.
  struct Tile {
    const MqaTask<FlatKeys>& task;
    const KeyWindow (&windows)[Config::kQueries];
    std::int32_t first_query;
    std::uint32_t first_key, key;
    KeyWindow common;
    float scale = 0.0f;

    __device__ Tile(const MqaLogitsMath& math, const Work& work, int slot)
        : task(math.task_),
          windows(math.shared_.windows[slot]),
          first_query(work.first_query),
          first_key(work.first_key),
          key(work.first_key + math.row_of_tile()),
          common(work.common) {}

    __device__ void load_scale() {
      if (key >= task.keys.num_keys) return;
      scale = *reinterpret_cast<const float*>(task.keys.scale + key * task.keys.scale_stride);
    }
    __device__ void advance() {
      first_key += Config::kTileKeys;
      key += Config::kTileKeys;
    }
    __device__ bool is_inside() const {
      return !task.columns_are_relative && first_key >= common.begin &&
             first_key + Config::kTileKeys <= common.end;
    }
  };

  // After the sum over a quad, lane 4 g + t has key row g + 8 * (t % 2), and the query t / 2 of
  // each two.
  __device__ std::uint32_t row_of_tile() const {
    const int warp = threadIdx.x / 32 % 4;
    return warpgroup_ * Config::kWarpgroupKeys + warp * 16 + lane_ % 2 * 8 + lane_ / 4;
  }

  // Those of a relu that comes doubled are halved: see sum_heads.
  __device__ void load_weights(int slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kWeights / 2; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(
            &shared_.weights[slot][half * kHalfColumns + 8 * j + lane_ % 4 * 2]);
        weight_[half][2 * j] = pair.x;
        weight_[half][2 * j + 1] = 0.5f * pair.y;
      }
    }
  }

  // The products of one half run while the other is summed. At the end nothing is left running: the
  // assembler sees through no loop, and would have every product waited for.
  template <int kTiles>
  __device__ void run_tiles(const std::uint8_t* q, KeyStage& stage, Tile& tile) const {
    float even[64], odd[64];
    ptx::mbarrier_wait(shared_.full_k[stage.index], stage.phase);
    multiply(even, stage.index, q);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      multiply(odd, stage.index, q + kHalfBytes);
      tile.load_scale();
      ptx::wgmma_wait<1>();
      ptx::wgmma_result(even);
      finish<0>(even, tile);
      const int done = stage.index;
      stage.advance();
      if (i + 1 < kTiles) {
        ptx::mbarrier_wait(shared_.full_k[stage.index], stage.phase);
        multiply(even, stage.index, q);
        ptx::wgmma_wait<1>();
      } else {
        ptx::wgmma_wait<0>();
      }
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_k[done]);
      ptx::wgmma_result(odd);
      finish<1>(odd, tile);
      tile.advance();
    }
  }

  // Starts d = K Q^T of this warpgroup's keys.
  __device__ void multiply(float (&d)[64], int stage, const std::uint8_t* q) const {
    const std::uint64_t a = ptx::wgmma_descriptor<Config::kDim>(
        shared_.k[stage] + warpgroup_ * (Config::kWarpgroupKeys * Config::kDim));
    const std::uint64_t b = ptx::wgmma_descriptor<Config::kDim>(q);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kDim / 32; ++step) {
      ptx::wgmma_64x128x32_e4m3(d, a + step * 2, b + step * 2, step > 0);
    }
    ptx::wgmma_commit();
  }

  // max(x, 0), a NaN stays one: on the integer pipe, at half the rate of a sum.
  __device__ static float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
  }

  template <int kHalf>
  __device__ void finish(const float (&d)[64], const Tile& tile) const {
    float logits[kPerLane];
    sum_heads(d, weight_[kHalf], logits);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logits[i] *= tile.scale;
    if (kSums < 4 && lane_ % 4 >= 2) return;
    const std::int32_t query = kHalf * kHalfQueries + (kSums < 4 ? 0 : lane_ / 2 % 2);
    if (tile.is_inside()) {
      store_all(tile.first_query + query, tile.key, logits);
    } else {
      store(tile.first_query, query, tile.windows, tile.key, logits);
    }
  }

  // For every other column relu(x) is x + |x|, doubled, on the pipe of the products; for the rest
  // max(x, 0), beside it.
  __device__ void sum_heads(const float (&d)[64], const float (&weight)[kWeights],
                            float (&logits)[kPerLane]) const {
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < kHalfColumns / 8; ++j) {
      const int query = 8 * j / Config::kHeads;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float x = d[4 * j + 2 * row + column];
          const float y = column == 1 ? x + fabsf(x) : relu(x);
          float& sum = sums[2 * query + row];
          sum = fmaf(y, weight[2 * j + column], sum);
        }
      }
    }
    float half[kSums / 2];
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const bool odd = lane_ % 2 == 1;
      const float keep = odd ? sums[2 * i + 1] : sums[2 * i];
      const float send = odd ? sums[2 * i] : sums[2 * i + 1];
      half[i] = keep + __shfl_xor_sync(~0u, send, 1);
    }
    if constexpr (kSums < 4) {
      logits[0] = half[0] + __shfl_xor_sync(~0u, half[0], 2);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const bool odd = lane_ / 2 % 2 == 1;
        const float keep = odd ? half[2 * i + 1] : half[2 * i];
        const float send = odd ? half[2 * i] : half[2 * i + 1];
        logits[i] = keep + __shfl_xor_sync(~0u, send, 2);
      }
    }
  }

  // A tile that all queries see in full; logits of rows `row`, row + 2, ...
  __device__ void store_all(std::int64_t row, std::uint32_t key,
                            const float (&logits)[kPerLane]) const {
    const std::int64_t at = row * task_.out_stride + key;
    if (task_.out_is_bf16) {
      auto* out = static_cast<__nv_bfloat16*>(task_.out) + at;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        out[2 * i * task_.out_stride] = __float2bfloat16_rn(logits[i]);
      }
    } else {
      auto* out = static_cast<float*>(task_.out) + at;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) out[2 * i * task_.out_stride] = logits[i];
    }
  }

  __device__ void store(std::int32_t first_query, std::int32_t query,
                        const KeyWindow (&windows)[Config::kQueries], std::uint32_t key,
                        const float (&logits)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const std::int32_t row = first_query + query + 2 * i;
      const KeyWindow window = windows[query + 2 * i];
      if (key >= window.begin && key < window.end) {
        const std::uint32_t column = task_.columns_are_relative ? key - window.begin : key;
        store_logit(task_, row, column, logits[i]);
      } else if (task_.clean && !task_.columns_are_relative && key < task_.columns &&
                 row < task_.rows_per_group) {
        store_logit(task_, row, key, -__builtin_huge_valf());
      }
    }
  }

  SharedStorage& shared_;
  const MqaTask<FlatKeys>& task_;
  int warpgroup_, lane_;
  float weight_[2][kWeights];
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_mqa_logits_kernel(const __grid_constant__ MqaTask<FlatKeys> task,
                            const __grid_constant__ MqaLogitsSchedule schedule,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
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
  __syncthreads();
  if (threadIdx.x / 128 == Config::kMathWarpgroups) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    MqaLogitsProducer<Config>::run(shared, task, schedule, q_map, k_map);
  } else {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    MqaLogitsMath<Config>(shared, task).run();
  }
}

}  // namespace dsa::cuda::sm90a
