// SPDX-License-Identifier: Apache-2.0
// Indexer logits on Hopper: out[query, key] = scale[key] * sum over heads of weight * relu(q . k).
//
// Tile       D [keys, columns] = K Q^T, e4m3. A column is a head of a query, a row a key, so that a
//            thread sums over heads in registers. 128 keys by 512 columns: 512 / kHeads queries.
// Warpgroups 0 to 3 (0 to 2 for 16 heads): math, 128 columns each, in two products of 64 keys. While
//            one warpgroup sums, the products of the others run. The last: producer. Its warp 0
//            copies queries and keys, warp 1 stages weights and windows, warps 2 and 3 write -inf to
//            what no tile covers.
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
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"

namespace dsa::cuda::sm90a {

// The tiles of keys that some query of a block sees.
template <typename Config>
struct BlockTiles {
  std::uint32_t first_key;
  std::uint32_t tiles;

  // Of the hull of the windows, {~0, 0} if all are empty.
  __device__ BlockTiles(KeyWindow hull, const MqaLogitsRange& keys) {
    const std::uint32_t begin = max(hull.begin, keys.begin);
    const std::uint32_t end = min(hull.end, keys.end);
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

  __device__ BlockWindows(const MqaTask<FlatKeys>& task, std::int64_t first_query, int lane) {
    static_assert(Config::kQueries <= 32);
    const std::int64_t row = first_query + lane;
    const bool is_query = lane < Config::kQueries;
    if (is_query && row < task.rows_per_group) window = task.keys.window(0, row);
    const bool empty = window.begin >= window.end;
    hull.begin = __reduce_min_sync(~0u, empty ? ~0u : window.begin);
    hull.end = __reduce_max_sync(~0u, empty ? 0u : window.end);
    common.begin = __reduce_max_sync(~0u, is_query ? window.begin : 0u);
    common.end = __reduce_min_sync(~0u, is_query ? window.end : ~0u);
  }
};

// The same by one thread: only how many tiles.
template <typename Config>
__device__ std::uint32_t count_tiles(const MqaTask<FlatKeys>& task, const MqaLogitsRange& keys,
                                     std::int64_t block) {
  KeyWindow hull{~0u, 0u};
#pragma unroll 4
  for (int query = 0; query < Config::kQueries; ++query) {
    const std::int64_t row = block * Config::kQueries + query;
    const KeyWindow window = row < task.rows_per_group ? task.keys.window(0, row) : KeyWindow{};
    if (window.begin >= window.end) continue;
    hull.begin = min(hull.begin, window.begin);
    hull.end = max(hull.end, window.end);
  }
  return BlockTiles<Config>(hull, keys).tiles;
}

// Finds this CTA's share: of all tiles, block after block, the CTAs take equally many. By all
// threads.
template <typename Config>
__device__ void find_share(typename Config::SharedStorage& shared, const MqaTask<FlatKeys>& task,
                           const MqaLogitsRange& keys) {
  constexpr int kWarps = Config::kThreads / 32;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::int64_t blocks =
      (task.rows_per_group + Config::kQueries - 1) / Config::kQueries;
  const std::int64_t each = (blocks + Config::kThreads - 1) / Config::kThreads;
  const std::int64_t begin = min(threadIdx.x * each, blocks);
  const std::int64_t end = min(begin + each, blocks);
  std::uint32_t mine = 0;
  for (std::int64_t block = begin; block < end; ++block) {
    mine += count_tiles<Config>(task, keys, block);
  }
  std::uint32_t before = mine;  // inclusive, in the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::uint32_t other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) shared.warp_tiles[warp] = before;
  if (threadIdx.x == 0) shared.share = {};
  __syncthreads();
  const std::uint32_t of_warp = lane < kWarps ? shared.warp_tiles[lane] : 0;
  const std::uint32_t total = __reduce_add_sync(~0u, of_warp);
  before += __reduce_add_sync(~0u, lane < warp ? of_warp : 0) - mine;

  const auto share_begin =
      static_cast<std::uint32_t>(std::uint64_t{total} * blockIdx.x / gridDim.x);
  const auto share_end =
      static_cast<std::uint32_t>(std::uint64_t{total} * (blockIdx.x + 1) / gridDim.x);
  if (share_begin >= before && share_begin < before + mine) {
    std::uint32_t skip = share_begin - before;
    std::int64_t block = begin;
    for (; true; ++block) {
      const std::uint32_t tiles = count_tiles<Config>(task, keys, block);
      if (skip < tiles) break;
      skip -= tiles;
    }
    shared.share = {block, skip, share_end - share_begin};
  }
}

__device__ __forceinline__ void store_logit(const MqaTask<FlatKeys>& task, void* out,
                                            std::int64_t at, float value) {
  if (task.out_is_bf16) {
    static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(out)[at] = value;
  }
}

template <typename Config>
class MqaLogitsProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  static __device__ void run(SharedStorage& shared, const MqaTask<FlatKeys>& task,
                             const MqaLogitsRange& keys, const CUtensorMap& q_map,
                             const CUtensorMap& k_map) {
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    if (warp >= 2) {
      if (task.clean) clean(task, keys, lane);
      return;
    }
    auto slot = PipelineState<Config::kQuerySlots>::producer_start();
    auto stage = PipelineState<Config::kKeyStages>::producer_start();
    auto [block, skip, left] = shared.share;
    for (; left > 0; ++block, skip = 0) {
      const auto first_query = static_cast<std::int32_t>(block * Config::kQueries);
      const BlockWindows<Config> windows(task, first_query, lane);
      const BlockTiles<Config> of_block(windows.hull, keys);
      const std::uint32_t tiles = min(of_block.tiles - skip, left);
      if (tiles == 0) continue;
      left -= tiles;
      ptx::mbarrier_wait(shared.empty_q[slot.index], slot.phase);
      if (warp == 1) {
        stage_weights(shared, slot.index, task, first_query, windows.window, lane);
      } else if (lane == 0) {
        const std::uint32_t first_key = of_block.first_key + skip * Config::kTileKeys;
        shared.work[slot.index] = {first_query, first_key, static_cast<std::int32_t>(tiles),
                                   windows.common};
        ptx::mbarrier_arrive_expect(shared.full_q[slot.index], Config::kQueryBytes);
        ptx::tma_load(shared.q[slot.index], q_map, shared.full_q[slot.index], 0, 0, first_query);
        for (std::uint32_t tile = 0; tile < tiles; ++tile) {
          ptx::mbarrier_wait(shared.empty_k[stage.index], stage.phase);
          ptx::mbarrier_arrive_expect(shared.full_k[stage.index], Config::kKeyBytes);
          ptx::tma_load(shared.k[stage.index], k_map, shared.full_k[stage.index], 0,
                        static_cast<std::int32_t>(first_key + tile * Config::kTileKeys));
          stage.advance();
        }
      }
      __syncwarp();
      slot.advance();
    }
    if (lane == 0) {
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

  // -inf to what no tile covers; blocks go round the CTAs. By warps 2 and 3.
  static __device__ void clean(const MqaTask<FlatKeys>& task, const MqaLogitsRange& keys,
                               int lane) {
    const std::int64_t step = std::int64_t{gridDim.x} * Config::kQueries;
    for (std::int64_t first_query = std::int64_t{blockIdx.x} * Config::kQueries;
         first_query < task.rows_per_group; first_query += step) {
      const BlockWindows<Config> windows(task, first_query, lane);
      const BlockTiles<Config> of_block(windows.hull, keys);
      for (int i = 0; i < Config::kQueries && first_query + i < task.rows_per_group; ++i) {
        // What is written elsewhere: the window, or the tiles.
        std::uint32_t skip_begin = 0;
        std::uint32_t skip_end =
            __shfl_sync(~0u, windows.window.end, i) - __shfl_sync(~0u, windows.window.begin, i);
        if (!task.columns_are_relative) {
          skip_begin = of_block.first_key;
          skip_end = skip_begin + of_block.tiles * Config::kTileKeys;
        }
        const std::int64_t row = (first_query + i) * task.out_stride;
        fill(task, row, keys.begin, min(skip_begin, keys.columns_end));
        fill(task, row, max(skip_end, keys.begin), keys.columns_end);
      }
    }
  }

  static __device__ void fill(const MqaTask<FlatKeys>& task, std::int64_t row,
                              std::uint32_t begin, std::uint32_t end) {
    if (task.out_is_bf16) {
      fill(static_cast<__nv_bfloat16*>(task.out) + row, begin, end, 0xFF80'FF80u);
    } else {
      fill(static_cast<float*>(task.out) + row, begin, end, 0xFF80'0000u);
    }
  }

  // 16 bytes a store between the columns where the row allows it; `word` is -inf.
  template <typename T>
  static __device__ void fill(T* out, std::uint32_t begin, std::uint32_t end, std::uint32_t word) {
    constexpr std::uint32_t kVector = 16 / sizeof(T);
    if (begin >= end) return;
    const auto misaligned = static_cast<std::uint32_t>(
        reinterpret_cast<std::uintptr_t>(out + begin) / sizeof(T) % kVector);
    const std::uint32_t aligned = begin + (misaligned == 0 ? 0 : kVector - misaligned);
    const std::uint32_t thread = threadIdx.x % 64;
    if (thread < kVector && begin + thread < min(aligned, end)) out[begin + thread] = T(-INFINITY);
    std::uint32_t column = aligned + thread * kVector;
    for (; column + kVector <= end; column += 64 * kVector) {
      *reinterpret_cast<uint4*>(out + column) = make_uint4(word, word, word, word);
    }
    for (; column < end; ++column) out[column] = T(-INFINITY);  // less than a vector, by one thread
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
        lane_(threadIdx.x % 32),
        k_(shared.k) {}

  __device__ void run() {
    auto slot = PipelineState<Config::kQuerySlots>::consumer_start();
    auto stage = KeyStage::consumer_start();
    while (true) {
      ptx::mbarrier_wait(shared_.full_q[slot.index], slot.phase);
      const Work work = shared_.work[slot.index];
      const int tiles = __shfl_sync(~0u, work.tiles, 0);
      if (tiles < 0) break;
      run_chunk(work, tiles, slot.index, stage);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_q[slot.index]);
      slot.advance();
    }
  }

 private:
  using KeyStage = PipelineState<Config::kKeyStages>;
  using Descriptor = ptx::WgmmaDescriptor<Config::kDim>;
  static constexpr int kProductBytes = Config::kProductKeys * Config::kDim;
  static constexpr int kWgQueries = Config::kWarpgroupQueries;
  static constexpr int kWeights = Config::kWarpgroupColumns / 4;  // of a thread
  static constexpr int kPerLane = kWgQueries < 2 ? 1 : kWgQueries / 2;

  // What a thread keeps from tile to tile of a chunk.
  struct Place {
    int slot;                   // of the queries
    std::int32_t first_query;   // of the warpgroup
    std::uint32_t key;          // of the thread, in the next product
    const std::uint8_t* scale;  // of that key
    void* out;                  // of that key and the thread's first query
  };

  __device__ void run_chunk(const Work& work, int tiles, int slot, KeyStage& stage) {
    load_weights(slot);
    Place at;
    at.slot = slot;
    at.first_query = __shfl_sync(~0u, work.first_query, 0) + warpgroup_ * kWgQueries;
    at.key = work.first_key + row_of_product();
    at.scale = task_.keys.scale + at.key * task_.keys.scale_stride;
    const std::int64_t row = at.first_query + (kWgQueries < 2 ? 0 : lane_ / 2 % 2);
    const std::int64_t logit = row * task_.out_stride + at.key;
    at.out = task_.out_is_bf16 ? static_cast<void*>(static_cast<__nv_bfloat16*>(task_.out) + logit)
                               : static_cast<float*>(task_.out) + logit;
    const Descriptor q(shared_.q[slot] + warpgroup_ * (Config::kWarpgroupColumns * Config::kDim));

    // Tiles that all queries see in full stand between those that some do not.
    int full_begin = tiles, full_end = tiles;
    if (!task_.columns_are_relative && work.common.begin < work.common.end) {
      const auto first_full = static_cast<std::int32_t>(
          (work.common.begin > work.first_key ? work.common.begin - work.first_key : 0u) +
          Config::kTileKeys - 1) / Config::kTileKeys;
      const std::int32_t past_full =
          work.common.end > work.first_key
              ? static_cast<std::int32_t>((work.common.end - work.first_key) / Config::kTileKeys)
              : 0;
      full_begin = __shfl_sync(~0u, min(first_full, tiles), 0);
      full_end = __shfl_sync(~0u, max(min(past_full, tiles), full_begin), 0);
    }
    int tile = 0;
    for (; tile < full_begin; ++tile) run_tile<void>(q, stage, at);
    if (task_.out_is_bf16) {
      for (; tile < full_end; ++tile) run_tile<__nv_bfloat16>(q, stage, at);
    } else {
      for (; tile < full_end; ++tile) run_tile<float>(q, stage, at);
    }
    for (; tile < tiles; ++tile) run_tile<void>(q, stage, at);
  }

  // After the sum over a quad, lane 4 g + t has key row g + 8 * (t % 2), and the query t / 2 of
  // each two.
  __device__ std::uint32_t row_of_product() const {
    return threadIdx.x / 32 % 4 * 16 + lane_ % 2 * 8 + lane_ / 4;
  }

  // Those of a relu that comes doubled are halved: see sum_heads.
  __device__ void load_weights(int slot) {
    const float* weights = shared_.weights[slot] + warpgroup_ * Config::kWarpgroupColumns;
#pragma unroll
    for (int j = 0; j < kWeights / 2; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&weights[8 * j + lane_ % 4 * 2]);
      weight_[2 * j] = pair.x;
      weight_[2 * j + 1] = 0.5f * pair.y;
    }
  }

  // Full: the type of the logits of a tile that all queries see in full, else void.
  template <typename Full>
  __device__ void run_tile(Descriptor q, KeyStage& stage, Place& at) const {
    constexpr bool kIsFull = !std::is_void_v<Full>;
    ptx::mbarrier_wait(shared_.full_k[stage.index], stage.phase);
#pragma unroll
    for (int product = 0; product < Config::kProducts; ++product) {
      float d[64];
      multiply(d, k_ + (stage.index * Config::kKeyBytes + product * kProductBytes), q);
      float scale = 0.0f;
      if (kIsFull || at.key < task_.keys.num_keys) {
        scale = *reinterpret_cast<const float*>(at.scale);
      }
      ptx::wgmma_wait<0>();
      ptx::wgmma_result(d);
      if (product == Config::kProducts - 1 && lane_ == 0) {
        ptx::mbarrier_arrive(shared_.empty_k[stage.index]);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float logit = sum_heads(d, i) * scale;
        if (kWgQueries < 2 && lane_ % 4 >= 2) continue;
        const std::int64_t offset = 2 * i * task_.out_stride + product * Config::kProductKeys;
        if constexpr (kIsFull) {
          static_cast<Full*>(at.out)[offset] = Full(logit);
        } else {
          store(at, i, offset, logit);
        }
      }
      at.key += Config::kProductKeys;
      at.scale += Config::kProductKeys * task_.keys.scale_stride;
    }
    at.out = static_cast<char*>(at.out) + Config::kTileKeys * (task_.out_is_bf16 ? 2 : 4);
    stage.advance();
  }

  // Starts d = K Q^T.
  __device__ void multiply(float (&d)[64], Descriptor k, Descriptor q) const {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kDim / 32; ++step) {
      ptx::wgmma_64x128x32_e4m3(d, k + step * 32, q + step * 32, step > 0);
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
  __device__ __forceinline__ float sum_heads(const float (&d)[64], int i) const {
    constexpr int kTogether = kWgQueries < 2 ? 1 : 2;
    constexpr int kColumns = kTogether * Config::kHeads;
    float sums[kTogether][2] = {};  // [query][row] of this lane's columns
#pragma unroll
    for (int eight = 0; eight < kColumns / 8; ++eight) {
      float(&sum)[2] = sums[8 * eight / Config::kHeads];
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

  // `offset` from at.out in elements.
  __device__ void store(const Place& at, int i, std::int64_t offset, float logit) const {
    const std::int32_t query = (kWgQueries < 2 ? 0 : lane_ / 2 % 2) + 2 * i;
    const KeyWindow window = shared_.windows[at.slot][warpgroup_ * kWgQueries + query];
    if (at.key >= window.begin && at.key < window.end) {
      if (task_.columns_are_relative) offset -= window.begin;
    } else {
      if (!task_.clean || task_.columns_are_relative || at.key >= task_.columns ||
          at.first_query + query >= task_.rows_per_group) {
        return;
      }
      logit = -__builtin_huge_valf();
    }
    store_logit(task_, at.out, offset, logit);
  }

  SharedStorage& shared_;
  const MqaTask<FlatKeys>& task_;
  int warpgroup_, lane_;
  Descriptor k_;  // of the first stage
  float weight_[kWeights];
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_mqa_logits_kernel(const __grid_constant__ MqaTask<FlatKeys> task,
                            const __grid_constant__ MqaLogitsRange keys,
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
  find_share<Config>(shared, task, keys);
  __syncthreads();
  if (threadIdx.x / 128 == Config::kMathWarpgroups) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    MqaLogitsProducer<Config>::run(shared, task, keys, q_map, k_map);
  } else {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    MqaLogitsMath<Config>(shared, task).run();
  }
}

}  // namespace dsa::cuda::sm90a
