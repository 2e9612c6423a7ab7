// SPDX-License-Identifier: Apache-2.0
// What the indexer's kernels share: the rows and keys of a CTA, and a warp's queries against a
// block of keys.
//
// The head rows of a warp, 64, are 4, 2 or 1 queries of up to 16, 32 or 64 heads, missing heads
// with weight 0; two warps share a query of up to 128 heads. D[head, key] = q . k by mma.sync, then
// relu, weights, and the sum over the heads.
//
// A warp is pipelined over n-tiles of 8 keys: the products of one are issued beside the sums of the
// one before it, which stay in registers from one block of keys to the next. flush() ends it.
// Registers (D = 128, widened): A 4 m-tiles x 8 k-steps x 4 = 128, accumulators 2 n-tiles x 4 x 4 =
//   32, B of a key 16, sums 8, weights 8.
// Determinism: the sums of a logit are taken in an order that depends on H and D alone.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <limits>

#include "cuda/portable/mqa_logits_config.h"
#include "cuda/portable/mqa_logits_products.cuh"
#include "cuda/ptx/arithmetic.cuh"

namespace dsa::cuda {

// Stores without a branch, which would end what the compiler can overlap.
__device__ __forceinline__ void store_if(bool condition, float* to, float x) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0;\n"
      "@p st.global.f32 [%0], %1; }" ::"l"(__cvta_generic_to_global(to)),
      "f"(x), "r"(static_cast<int>(condition))
      : "memory");
}
__device__ __forceinline__ void store_if(bool condition, __nv_bfloat16* to, float x) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0;\n"
      "@p st.global.u16 [%0], %1; }" ::"l"(__cvta_generic_to_global(to)),
      "h"(__bfloat16_as_ushort(__float2bfloat16_rn(x))), "r"(static_cast<int>(condition))
      : "memory");
}

// Sums v[i] over the 8 lanes with equal lane % 4: the sum of v[i] is returned where lane / 4 == i.
__device__ __forceinline__ float reduce_scatter(const float (&v)[8], int lane) {
  float sums[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = v[i];
#pragma unroll
  for (int kept = 4, bit = 16; kept >= 1; kept /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float mine = upper ? sums[i + kept] : sums[i];
      const float sent = upper ? sums[i] : sums[i + kept];
      sums[i] = mine + __shfl_xor_sync(~0u, sent, bit);
    }
  }
  return sums[0];
}

// The scale of a key, and whether it is in a valid page.
struct KeyInfo {
  float scale = 0.0f;
  bool mapped = true;
};

// The rows and keys of a CTA. Grid: x = groups x blocks of rows, y = chunks of keys.
template <typename Keys>
class MqaCta {
 public:
  __device__ __forceinline__ explicit MqaCta(const MqaTask<Keys>& task)
      : task(task),
        lane(static_cast<int>(threadIdx.x % 32)),
        warp(static_cast<int>(threadIdx.x / 32)),
        group(row_cta() / task.ctas_per_group),
        first_row(std::int64_t{row_cta() % task.ctas_per_group} * task.cta_rows),
        chunk{blockIdx.y * task.chunk_keys, (blockIdx.y + 1) * task.chunk_keys} {}

  // Rows are numbered within their group, except in the output and the weights.
  __device__ __forceinline__ std::int64_t output_row(std::int64_t row) const {
    return group * task.rows_per_group + row;
  }

  // Of a row of the group; of one past its end, empty.
  __device__ __forceinline__ KeyWindow window(std::int64_t row) const {
    return row < task.rows_per_group ? task.keys.window(group, row) : KeyWindow{};
  }

  // What the windows of a warp's lanes span, of this chunk. It begins at a multiple of 32 keys:
  // whole sectors of the output in a store, where it is aligned.
  __device__ __forceinline__ KeyWindow span(KeyWindow w) const {
    const std::uint32_t begin =
        w.begin < w.end ? w.begin : std::numeric_limits<std::uint32_t>::max();
    return {max(chunk.begin, __reduce_min_sync(~0u, begin)) / 32 * 32,
            min(chunk.end, __reduce_max_sync(~0u, w.end))};
  }

  // If `seen`; then `at` is in the output.
  __device__ __forceinline__ void store(bool seen, std::int64_t at, float logit) const {
    store_if(seen && task.out_is_bf16, static_cast<__nv_bfloat16*>(task.out) + at, logit);
    store_if(seen && !task.out_is_bf16, static_cast<float*>(task.out) + at, logit);
  }

  // -inf to the columns of the chunk that are outside the windows, a warp a row.
  __device__ __forceinline__ void clear_outside_windows() const {
    constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
    const std::int64_t chunk_end = min(std::int64_t{chunk.end}, task.columns);
    for (int r = warp; r < task.cta_rows; r += MqaTile::kWarps) {
      const std::int64_t row = first_row + r;
      if (row >= task.rows_per_group) return;
      KeyWindow seen = window(row);
      if (task.columns_are_relative) seen = {0, seen.end - seen.begin};
      const std::int64_t at = output_row(row) * task.out_stride;
      const std::int64_t before = min(chunk_end, std::int64_t{seen.begin});
      for (std::int64_t c = std::int64_t{chunk.begin} + lane; c < before; c += 32) {
        store(true, at + c, kMinusInf);
      }
      const std::int64_t after = max(chunk.begin, seen.end);
      for (std::int64_t c = after + lane; c < chunk_end; c += 32) store(true, at + c, kMinusInf);
    }
  }

  const MqaTask<Keys>& task;
  const int lane, warp;
  const std::int64_t group;
  const std::int64_t first_row;  // in the group
  const KeyWindow chunk;

 private:
  // The last rows first: where later rows see more keys, the longest CTAs then start first.
  __device__ __forceinline__ static unsigned row_cta() { return gridDim.x - 1 - blockIdx.x; }
};

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
class MqaScores {
 public:
  using Products = ProductsOf<kHeadDim>;
  using Unit = LaneUnit<kHeadDim>;
  static constexpr int kSteps = Products::kUnitSteps * Unit::kUnits;
  static constexpr int kQueries = kHeads < MqaTile::kWarpHeads ? MqaTile::kWarpHeads / kHeads : 1;
  static constexpr int kWarpsPerQuery = kHeads > MqaTile::kWarpHeads ? 2 : 1;
  static constexpr int kTiles = MqaTile::kBlockKeys / 8;  // n-tiles of a block of keys
  // N-tiles that make 8 sums a lane, so that reduce_scatter leaves one.
  static constexpr int kSumTiles = 4 / kQueries;

  using Fragments = std::uint32_t[kSteps][2];  // B of the key lane / 4 of an n-tile

  // Of the queries of warp `warp_q` of the CTA.
  __device__ __forceinline__ MqaScores(const MqaCta<Keys>& cta, int warp_q)
      : cta_(cta),
        first_row_(cta.first_row + warp_q / kWarpsPerQuery * kQueries),
        first_head_(warp_q % kWarpsPerQuery * MqaTile::kWarpHeads) {
    const int sum = cta.lane / 4;  // that reduce_scatter leaves in this lane
    const std::int64_t row = first_row_ + sum / (2 * kSumTiles);
    key_in_sums_ = sum / 2 % kSumTiles * 8 + cta.lane % 4 * 2 + sum % 2;
    window_ = cta.window(row);
    at_ = cta.output_row(row) * cta.task.out_stride -
          (cta.task.columns_are_relative ? window_.begin : 0);
    warp_window_ = cta.span(window_);
    window_.end = min(window_.end, cta.chunk.end);
  }

  // Of the warp's rows and this chunk.
  __device__ __forceinline__ KeyWindow warp_window() const { return warp_window_; }

  // A fragments and weights of the warp's head rows.
  __device__ __forceinline__ void load_queries() {
    const MqaTask<Keys>& task = cta_.task;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Unit units[kMTiles][Unit::kUnits];  // these loads are all in flight before the first use
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        const int head = first_head_ + m % kQueryMTiles * 16 + half * 8 + cta_.lane / 4;
        const std::int64_t row = first_row_ + m / kQueryMTiles;
        const bool valid = head < task.num_heads && row < task.rows_per_group;
        weights_[m][half] = 0.0f;
        if (valid)
          weights_[m][half] = task.weights[cta_.output_row(row) * task.weights_stride + head];
        const std::uint8_t* q = task.q + cta_.group * task.q_strides[0] + row * task.q_strides[1] +
                                head * task.q_strides[2];
#pragma unroll
        for (int u = 0; u < Unit::kUnits; ++u) {
          units[m][u].clear();
          if (valid) units[m][u].load(q + (u * 4 + cta_.lane % 4) * Unit::kBytes, task.q_alignment);
        }
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int u = 0; u < Unit::kUnits; ++u) {
          std::uint32_t f[Products::kUnitSteps][2];
          Products::fragments(units[m][u], f);
#pragma unroll
          for (int i = 0; i < Products::kUnitSteps; ++i) {
            a_[m][u * Products::kUnitSteps + i][half] = f[i][0];
            a_[m][u * Products::kUnitSteps + i][half + 2] = f[i][1];
          }
        }
      }
    }
  }

  // A block of keys. fetch(n, b) gets the fragments of n-tile n; info(key) is a KeyInfo of a key of
  // the block; beside() is work that only has to be done until the end, overlapped with the
  // products. emit(key, sum, info) takes this lane's sums, those of the last keys in the next call.
  template <typename Fetch, typename Info, typename Beside, typename Emit>
  __device__ __forceinline__ void score(std::uint32_t first, Fetch&& fetch, Info&& info,
                                        Beside&& beside, Emit&& emit) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if constexpr (Products::kWidensInside) touch_queries();
      Fragments b;
      fetch(n, b);
      multiply(n, b);
      if (n == kTiles - 1) beside();
      add_to_sums((n + kTiles - 1) % kTiles, emit);
      if (n % kSumTiles == 0) {
        pending_key_ = first + n * 8 + key_in_sums_;
        pending_info_ = info(n * 8 + key_in_sums_);
      }
    }
  }

  // Emits the last sums.
  template <typename Emit>
  __device__ __forceinline__ void flush(Emit&& emit) {
    add_to_sums(kTiles - 1, emit);
    pending_key_ = kNoKey;
  }

  // Writes the logit of a key if this lane's row sees it.
  __device__ __forceinline__ void write(std::uint32_t key, float sum, KeyInfo info) const {
    float logit = sum * Products::kSumScale * info.scale;
    if (!info.mapped) logit = -std::numeric_limits<float>::infinity();
    cta_.store(key >= window_.begin && key < window_.end, at_ + key, logit);
  }

 private:
  static constexpr int kMTiles = MqaTile::kWarpHeads / 16;
  static constexpr int kQueryMTiles = kMTiles / kQueries;
  static constexpr std::uint32_t kNoKey = std::numeric_limits<std::uint32_t>::max();

  // Changes nothing, which the compiler cannot know: widened outside the loop, the queries would
  // take twice their registers, too many.
  __device__ __forceinline__ void touch_queries() {
    const std::uint32_t nothing = pending_key_ == kNoKey - 1 ? 1 : 0;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a_[m][step][i] += nothing;
      }
    }
  }

  __device__ __forceinline__ void multiply(int n, const Fragments& b) {
    float (&acc)[kMTiles][4] = acc_[n % 2];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][i] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) Products::mma(acc[m], a_[m][step], b[step][0], b[step][1]);
    }
  }

  template <typename Emit>
  __device__ __forceinline__ void add_to_sums(int n, Emit&& emit) {
    const float (&acc)[kMTiles][4] = acc_[n % 2];
#pragma unroll
    for (int query = 0; query < kQueries; ++query) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int m = query * kQueryMTiles; m < (query + 1) * kQueryMTiles; ++m) {
          sum = fmaf(weights_[m][0], ptx::relu(acc[m][i]), sum);
          sum = fmaf(weights_[m][1], ptx::relu(acc[m][i + 2]), sum);
        }
        sums_[(query * kSumTiles + n % kSumTiles) * 2 + i] = sum;
      }
    }
    if (n % kSumTiles != kSumTiles - 1) return;
    emit(pending_key_, reduce_scatter(sums_, cta_.lane), pending_info_);
  }

  const MqaCta<Keys>& cta_;
  const std::int64_t first_row_;
  const int first_head_;

  std::uint32_t a_[kMTiles][kSteps][4];
  float weights_[kMTiles][2];
  float acc_[2][kMTiles][4] = {};  // of the n-tile at work and of the one before it
  float sums_[8] = {};

  // The row and the key whose sum reduce_scatter leaves in this lane.
  KeyWindow window_;
  KeyWindow warp_window_;
  std::int64_t at_;  // of key 0 in the output
  int key_in_sums_;
  std::uint32_t pending_key_ = kNoKey;
  KeyInfo pending_info_;
};

}  // namespace dsa::cuda
