// SPDX-License-Identifier: Apache-2.0
// Indexer logits by mma.sync, flat and paged (SM80): D[head, key] = q . k, then relu, weights, and
// the sum over the heads. What a group of rows shares, its keys, is read once a CTA.
//
// Tile: 64 head rows a warp x 128 keys a CTA. The head rows of a warp are 4, 2 or 1 queries of up
//   to 16, 32 or 64 heads, missing heads with weight 0; two warps share a query of up to 128 heads.
//   The 8 warps are warps_q x warps_k: warps_q sets of queries, each tile split over warps_k warps.
// Grid: x = groups x blocks of rows, y = chunks of keys. A CTA also writes -inf, if asked, to those
//   columns of its chunk that are outside the windows.
// Registers (D = 128, widened): A 4 m-tiles x 8 k-steps x 4 = 128, accumulators 4 x 2 n-tiles x 4 =
//   32, a tile ahead 16, weights 8. One CTA an SM.
// Shared memory: sizeof(SharedStorage), up to 70 KiB: two stages of 128 keys as fragments (D = 128:
//   f16, 256 bytes each), their scales, and the partial sums of warps that share a query.
// Protocol: in iteration i all threads turn the keys of tile i + 1, loaded into registers an
//   iteration earlier, into fragments in stage (i + 1) % 2, start loading tile i + 2, and compute
//   on stage i % 2. The barrier that ends an iteration publishes what was stored and frees what was
//   read.
// Determinism: the sums of a logit are taken in an order that depends on H and D alone.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <limits>

#include "cuda/portable/mqa_logits_config.h"
#include "cuda/portable/mqa_logits_products.cuh"

namespace dsa::cuda {

__device__ __forceinline__ float relu(float x) {  // of a NaN: NaN
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Sums v over the 8 lanes with equal lane % 4 and scatters the sums: value i ends up in v[0]
// (v[i % 2] of 16) of the lanes whose bits 4, 3, 2 are the leading bits of i.
template <int kValues, int kLaneBit = 16>
__device__ __forceinline__ void reduce_scatter(float* v, int lane) {
  if constexpr (kLaneBit >= 4) {
    constexpr int kKept = kValues > 1 ? kValues / 2 : 1;
    const bool upper = (lane & kLaneBit) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float kept = kValues > 1 && upper ? v[i + kValues - kKept] : v[i];
      const float sent = kValues > 1 && !upper ? v[i + kValues - kKept] : v[i];
      v[i] = kept + __shfl_xor_sync(~0u, sent, kLaneBit);
    }
    reduce_scatter<kKept, kLaneBit / 2>(v, lane);
  }
}

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
class MqaLogits {
 public:
  using Products = ProductsOf<kHeadDim>;
  static constexpr int kSteps = Products::kSteps;
  static constexpr int kLaneChunks = (kSteps + 1) / 2;  // 16 bytes: the B fragments of two k-steps
  static constexpr int kQueries = kHeads < MqaTile::kWarpHeads ? MqaTile::kWarpHeads / kHeads : 1;
  static constexpr int kWarpsPerQuery = kHeads > MqaTile::kWarpHeads ? 2 : 1;
  static constexpr int kMTiles = MqaTile::kWarpHeads / 16;
  static constexpr int kQueryMTiles = kMTiles / kQueries;
  static constexpr int kSums = kQueries * 4;                   // of a lane and a pair of n-tiles
  static constexpr int kLaneSums = kSums > 8 ? kSums / 8 : 1;  // after reduce_scatter

  struct SharedStorage {
    uint4 keys[2][MqaTile::kKeys][kLaneChunks * 4];
    float scale[2][MqaTile::kKeys];
    bool mapped[2][Keys::kMayMiss ? MqaTile::kKeys : 1];
    float partial[kWarpsPerQuery == 2 ? MqaTile::kWarps : 1][MqaTile::kKeys];  // [warp_q][key]
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "what a CTA has on SM86 and SM89");

  __device__ __forceinline__ MqaLogits(const MqaTask<Keys>& task, SharedStorage& shared)
      : task_(task),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x % 32)),
        warp_q_((threadIdx.x / 32) >> task.warps_k_log2),
        warp_k_((threadIdx.x / 32) & ((1 << task.warps_k_log2) - 1)),
        group_(row_cta() / task.ctas_per_group),
        first_row_(std::int64_t{row_cta() % task.ctas_per_group} * cta_rows()),
        chunk_{blockIdx.y * task.chunk_keys, (blockIdx.y + 1) * task.chunk_keys} {}

  __device__ __forceinline__ void run() {
    if (task_.clean) clear_outside_windows();
    const KeyWindow seen = span(lane_ < cta_rows() ? window(first_row_ + lane_) : KeyWindow{});
    // A multiple of 32 keys: whole sectors of the output in a store, where it is aligned.
    const std::uint32_t begin = max(chunk_.begin, seen.begin) / 32 * 32;
    end_ = min(chunk_.end, seen.end);
    if (begin >= end_) return;

    load_keys(begin);
    load_queries();
    store_keys(0);
    load_keys(begin + MqaTile::kKeys);
    __syncthreads();
    int stage = 0;
#pragma unroll 1
    for (std::uint32_t first = begin; first < end_; first += MqaTile::kKeys, stage ^= 1) {
      if (first + MqaTile::kKeys < end_) store_keys(stage ^ 1);
      load_keys(first + 2 * MqaTile::kKeys);
      score_tile(first, stage);
      if constexpr (kWarpsPerQuery == 2) add_partial_sums(first, stage);
      __syncthreads();
    }
  }

 private:
  // The last rows first: where later rows see more keys, the longest CTAs then start first.
  __device__ __forceinline__ static unsigned row_cta() { return gridDim.x - 1 - blockIdx.x; }

  __device__ __forceinline__ int cta_rows() const {
    return (MqaTile::kWarps >> task_.warps_k_log2) / kWarpsPerQuery * kQueries;
  }

  // Rows are numbered within their group, except in the output and the weights.
  __device__ __forceinline__ std::int64_t output_row(std::int64_t row) const {
    return group_ * task_.rows_per_group + row;
  }

  // Of a row of the group; of one past its end, empty.
  __device__ __forceinline__ KeyWindow window(std::int64_t row) const {
    return row < task_.rows_per_group ? task_.keys.window(group_, row) : KeyWindow{};
  }

  // What the windows of a warp's lanes span.
  __device__ __forceinline__ static KeyWindow span(KeyWindow w) {
    const std::uint32_t begin =
        w.begin < w.end ? w.begin : std::numeric_limits<std::uint32_t>::max();
    return {__reduce_min_sync(~0u, begin), __reduce_max_sync(~0u, w.end)};
  }

  __device__ __forceinline__ void store(std::int64_t at, float logit) const {
    if (task_.out_is_bf16) {
      static_cast<__nv_bfloat16*>(task_.out)[at] = __float2bfloat16_rn(logit);
    } else {
      static_cast<float*>(task_.out)[at] = logit;
    }
  }

  // A warp a row.
  __device__ __forceinline__ void clear_outside_windows() const {
    constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
    const std::int64_t chunk_end = min(std::int64_t{chunk_.end}, task_.columns);
    for (int r = threadIdx.x / 32; r < cta_rows(); r += MqaTile::kWarps) {
      const std::int64_t row = first_row_ + r;
      if (row >= task_.rows_per_group) return;
      KeyWindow seen = window(row);
      if (task_.columns_are_relative) seen = {0, seen.end - seen.begin};
      const std::int64_t at = output_row(row) * task_.out_stride;
      const std::int64_t before = min(chunk_end, std::int64_t{seen.begin});
      for (std::int64_t c = std::int64_t{chunk_.begin} + lane_; c < before; c += 32) {
        store(at + c, kMinusInf);
      }
      const std::int64_t after = max(chunk_.begin, seen.end);
      for (std::int64_t c = after + lane_; c < chunk_end; c += 32) store(at + c, kMinusInf);
    }
  }

  // A fragments and weights of the warp's head rows, and where this lane's logits go.
  __device__ __forceinline__ void load_queries() {
    const std::int64_t warp_row = first_row_ + warp_q_ / kWarpsPerQuery * kQueries;
    const int first_head = warp_q_ % kWarpsPerQuery * MqaTile::kWarpHeads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      LaneWords<kHeadDim> words[kMTiles];  // these loads are all in flight before the first use
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const int head = first_head + m % kQueryMTiles * 16 + half * 8 + lane_ / 4;
        const std::int64_t row = warp_row + m / kQueryMTiles;
        words[m].clear();
        weights_[m][half] = 0.0f;
        if (head >= task_.num_heads || row >= task_.rows_per_group) continue;
        const std::uint8_t* q = task_.q + group_ * task_.q_strides[0] + row * task_.q_strides[1];
        words[m].load(q + head * task_.q_strides[2], lane_ % 4, task_.q_alignment);
        weights_[m][half] = task_.weights[output_row(row) * task_.weights_stride + head];
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        std::uint32_t f[kSteps][2];
        Products::fragments(words[m], f);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          a_[m][step][half] = f[step][0];
          a_[m][step][half + 2] = f[step][1];
        }
      }
    }

    // Sum i of a lane is that of query i / 4, n-tile i / 2 % 2, key i % 2 of the lane's two.
    const int first_sum = kSums == 4 ? lane_ / 8 : lane_ / 4 * (kSums / 8);
    const std::int64_t row = warp_row + first_sum / 4;
    key_in_pair_ = first_sum / 2 % 2 * 8 + lane_ % 4 * 2 + first_sum % 2;
    window_ = window(row);
    at_ = output_row(row) * task_.out_stride - (task_.columns_are_relative ? window_.begin : 0);
    window_.end = min(window_.end, end_);
    warp_window_ = span(window_);
    // Of equal sums one is written.
    if (kSums == 4 && lane_ / 4 % 2 != 0) window_ = {};
  }

  // Keys first + ... of four threads each, into registers; zeros from end_ on.
  __device__ __forceinline__ void load_keys(std::uint32_t first) {
#pragma unroll
    for (int i = 0; i < MqaTile::kKeysPerThread; ++i) {
      const std::uint32_t key = first + key_of_thread(i);
      ahead_[i].clear();
      KeyAddress address;
      if (key < end_) address = task_.keys.locate(group_, key);
      scale_ahead_[i] = 0.0f;
      mapped_ahead_[i] = address.values != nullptr;
      if (!mapped_ahead_[i]) continue;
      ahead_[i].load(address.values, lane_ % 4, task_.key_alignment);
      if (lane_ % 4 == 0) scale_ahead_[i] = load_float(address.scale, task_.key_alignment);
    }
  }

  __device__ __forceinline__ void store_keys(int stage) {
#pragma unroll
    for (int i = 0; i < MqaTile::kKeysPerThread; ++i) {
      const int key = key_of_thread(i);
      std::uint32_t f[kSteps][2];
      Products::fragments(ahead_[i], f);
#pragma unroll
      for (int c = 0; c < kLaneChunks; ++c) {
        constexpr int kSecond = kSteps > 1 ? 1 : 0;  // D = 32 in e4m3 has one step
        const uint4 chunk = {f[2 * c][0], f[2 * c][1], f[2 * c + kSecond][0],
                             f[2 * c + kSecond][1]};
        shared_.keys[stage][key][place(key, c)] = chunk;
      }
      if (lane_ % 4 != 0) continue;
      shared_.scale[stage][key] = scale_ahead_[i];
      if constexpr (Keys::kMayMiss) shared_.mapped[stage][key] = mapped_ahead_[i];
    }
  }

  __device__ __forceinline__ static int key_of_thread(int i) {
    return static_cast<int>(threadIdx.x) / 4 + i * (MqaTile::kThreads / 4);
  }

  // Where a row of keys has chunk c of this lane: eight lanes, of an even key and the next one,
  // meet all banks once.
  __device__ __forceinline__ int place(int key, int c) const {
    const int chunk = c * 4 + lane_ % 4;
    return kLaneChunks > 1 ? chunk ^ ((key & 1) * 4) : chunk;
  }

  // Calls each(pair) for those pairs of n-tiles of a tile that are this warp's and in its windows.
  template <typename Each>
  __device__ __forceinline__ void for_each_pair(std::uint32_t first, Each&& each) const {
    constexpr int kPairs = MqaTile::kKeys / MqaTile::kPairKeys;
#pragma unroll 1
    for (int pair = warp_k_; pair < kPairs; pair += 1 << task_.warps_k_log2) {
      const std::uint32_t key = first + pair * MqaTile::kPairKeys;
      if (key < warp_window_.end && key + MqaTile::kPairKeys > warp_window_.begin) each(pair);
    }
  }

  __device__ __forceinline__ void score_tile(std::uint32_t first, int stage) {
    for_each_pair(first, [&](int pair) {
      float acc[kMTiles][2][4] = {};
      multiply(stage, pair, acc);
      float sums[kSums];
      weighted_relu_sums(acc, sums);
      reduce_scatter<kSums>(sums, lane_);
#pragma unroll
      for (int i = 0; i < kLaneSums; ++i) {
        const int key = pair * MqaTile::kPairKeys + key_in_pair_ + i;
        if constexpr (kWarpsPerQuery == 2) {
          shared_.partial[warp_q_][key] = sums[i];
        } else {
          emit(first, stage, key, sums[i]);
        }
      }
    });
  }

  __device__ __forceinline__ void multiply(int stage, int pair, float (&acc)[kMTiles][2][4]) const {
    const int key = pair * MqaTile::kPairKeys + lane_ / 4;
#pragma unroll
    for (int c = 0; c < kLaneChunks; ++c) {
      uint4 b[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) b[n] = shared_.keys[stage][key + 8 * n][place(key, c)];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) Products::mma(acc[m][n], a_[m][2 * c], b[n].x, b[n].y);
      }
      if constexpr (kSteps > 1) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            Products::mma(acc[m][n], a_[m][2 * c + 1], b[n].z, b[n].w);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void weighted_relu_sums(const float (&acc)[kMTiles][2][4],
                                                     float (&sums)[kSums]) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kQueryMTiles; ++j) {
        const int m = i / 4 * kQueryMTiles + j;
        const float (&d)[4] = acc[m][i / 2 % 2];
        sums[i] = fmaf(weights_[m][0], relu(d[i % 2]), sums[i]);
        sums[i] = fmaf(weights_[m][1], relu(d[i % 2 + 2]), sums[i]);
      }
    }
  }

  // The second warp of a query hands its sums to the first.
  __device__ __forceinline__ void add_partial_sums(std::uint32_t first, int stage) {
    __syncthreads();
    if (warp_q_ % 2 != 0) return;
    for_each_pair(first, [&](int pair) {
      const int key = pair * MqaTile::kPairKeys + key_in_pair_;
      emit(first, stage, key, shared_.partial[warp_q_][key] + shared_.partial[warp_q_ + 1][key]);
    });
  }

  // Writes the logit of a key of the tile if this lane's row sees it.
  __device__ __forceinline__ void emit(std::uint32_t first, int stage, int key_in_tile,
                                       float sum) const {
    const std::uint32_t key = first + key_in_tile;
    if (key < window_.begin || key >= window_.end) return;
    float logit = sum * Products::kSumScale * shared_.scale[stage][key_in_tile];
    if constexpr (Keys::kMayMiss) {
      if (!shared_.mapped[stage][key_in_tile]) logit = -std::numeric_limits<float>::infinity();
    }
    store(at_ + key, logit);
  }

  const MqaTask<Keys>& task_;
  SharedStorage& shared_;
  const int lane_;
  const int warp_q_, warp_k_;
  const std::int64_t group_;
  const std::int64_t first_row_;  // of the CTA, in its group
  const KeyWindow chunk_;
  std::uint32_t end_ = 0;  // of the keys that the CTA reads

  std::uint32_t a_[kMTiles][kSteps][4];
  float weights_[kMTiles][2];

  LaneWords<kHeadDim> ahead_[MqaTile::kKeysPerThread];
  float scale_ahead_[MqaTile::kKeysPerThread];
  bool mapped_ahead_[MqaTile::kKeysPerThread];

  // The row and the keys whose sums reduce_scatter leaves in this lane.
  KeyWindow window_;
  KeyWindow warp_window_;
  std::int64_t at_ = 0;  // of key 0 in the output
  int key_in_pair_ = 0;
};

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
__global__ void __launch_bounds__(MqaTile::kThreads, 1)
    portable_mqa_logits_kernel(const __grid_constant__ MqaTask<Keys> task) {
  using Logits = MqaLogits<ProductsOf, kHeadDim, kHeads, Keys>;
  extern __shared__ __align__(16) unsigned char shared[];
  Logits(task, *reinterpret_cast<typename Logits::SharedStorage*>(shared)).run();
}

}  // namespace dsa::cuda
