// SPDX-License-Identifier: Apache-2.0
// Sparse and dense MLA attention on mma.sync (SM80 and newer): prefill, decode, every cache format.
//
// Tile      one query token, kHeads heads (16, 32 or 64), kTokens keys at a time (32 or 64). A row
//           of the key tile is K in full and V in its first d_v dimensions.
// Warps     QK: a grid of kWarpsM x kWarpsN over [kHeads, kTokens], in pairs that share their keys.
//           With 16 heads 4 of 8 warps do QK and softmax while the others load the next tile. PV:
//           every warp has all heads and 64 (8 warps) or 128 (4 warps) of the 512 columns.
// Registers 64 heads: 8 warps, 128 fp32 of output and 64 of scores a thread, 1 CTA an SM.
//           32 heads: 4 warps, 128 of output. 16 heads: 8 warps, 32 of output. Both 2 CTAs an SM,
//           whose phases overlap.
// Shared    SharedStorage (attention_config.cuh): q, two key tiles, probabilities. FP8 rows stay as
//           they are until they are fragments. 64 heads, V3.2: 72 + 2 * 40 + 32 KiB.
// A tile    (a) Wait for its copies, barrier. (b) QK, between whose products the next tile's copies
//           begin; warp pairs exchange halves of their sums through p (two barriers of 64 threads);
//           row maxima to shared memory, barrier; every warp forms the same new base.
//           (c) p = 2^(s - base) to shared memory in 16 bits (V3.2: one copy for each of the four
//           groups, times its scale), barrier. (d) PV. The barrier of the next (a) frees p, the
//           tile and the maxima. The sums of p stay a thread's own until the end.
// Softmax   base follows the maximum only when that is 2^8 ahead, so that the output is rarely
//           rescaled. lse comes from the sum of the fp32 p. The output is divided by the sum of the
//           rounded p that it was made from, so that one dominant key comes out exact; V3.2, where
//           each group rounds its own, by the fp32 sum.
#pragma once

#include <cstdint>

#include "cuda/common/attention_place.cuh"
#include "cuda/portable/attention_rows.cuh"
#include "cuda/portable/attention_tile.cuh"

namespace dsa::cuda {

// Which query token and heads a CTA has.
struct CtaRow {
  std::int64_t launch_row;  // the token in this launch; in the whole batch token j of request b
  std::int64_t b, j;
  int first_head;

  template <typename Config>
  __device__ static CtaRow of(const AttentionArgs& args) {
    // Opaque, so that this is worked out twice rather than kept through the tile loop.
    unsigned cta = blockIdx.x;
    asm volatile("" : "+r"(cta));
    const unsigned head_tiles = (args.num_heads + Config::kHeads - 1) / Config::kHeads;
    const std::int64_t launch_row = cta / head_tiles;
    const std::int64_t row = args.first_row + launch_row;
    return {launch_row, row / args.tokens_per_request, row % args.tokens_per_request,
            static_cast<int>(cta % head_tiles) * Config::kHeads};
  }
};

// q of the CTA's heads; rows past the last head and dims past d_qk are zero.
template <typename Config>
__device__ void load_queries(typename Config::SharedStorage& shared, const AttentionArgs& args,
                             const CtaRow& where) {
  const std::uint16_t* q = args.q + where.b * args.q_stride_b + where.j * args.q_stride_j;
  const int chunks = args.d_qk * 2 / kChunk;
  const std::uint32_t dst = ptx::shared_address(shared.q);
#pragma unroll 2
  for (int head = threadIdx.x / 32; head < Config::kHeads; head += Config::kWarps) {
    const bool is_head = where.first_head + head < args.num_heads;
    const auto* src =
        reinterpret_cast<const std::uint8_t*>(q + (where.first_head + head) * args.q_stride_h);
    for (int chunk = threadIdx.x % 32; chunk < kRowBytes / kChunk; chunk += 32) {
      const std::uint32_t at = dst + swizzled<kRowBytes>(head, chunk);
      const bool valid = is_head && chunk < chunks;
      if (args.q_aligned) {
        copy_chunk<true>(at, src + chunk * kChunk, valid);
      } else {
        copy_chunk<false>(at, src + chunk * kChunk, valid);
      }
    }
  }
}

// q's part that meets e4m3, bf16 -> f16: each head times the power of two that brings its largest
// value just under 2^15, exact for all that is within 2^29 of it. Of each 16 dims 4t, 4t + 1 move
// to 2t, 2t + 1 and 4t + 2, 4t + 3 to 2t + 8, 2t + 9, as QkFragments wants them. A warp a head; a
// lane has 16 dims. q has arrived.
template <typename Config>
__device__ void narrow_queries(typename Config::SharedStorage& shared) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int head = threadIdx.x / 32; head < Config::kHeads; head += Config::kWarps) {
    auto* first = reinterpret_cast<uint4*>(shared.q + swizzled<kRowBytes>(head, 2 * lane));
    auto* second = reinterpret_cast<uint4*>(shared.q + swizzled<kRowBytes>(head, 2 * lane + 1));
    const bool has_dims = lane < Config::kNope / 16;
    std::uint32_t words[8] = {};
    if (has_dims) {
      const uint4 x = *first, y = *second;
      const std::uint32_t loaded[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
      for (int w = 0; w < 8; ++w) words[w] = loaded[w];
    }
    std::uint32_t largest = 0;  // bits of |q|
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      largest = max(largest, max(words[w] & 0x7FFFu, words[w] >> 16 & 0x7FFFu));
    }
    largest = __reduce_max_sync(~0u, largest);
    // 2^15 / 2^(e - 126) brings [2^(e-127), 2^(e-126)) under 2^15; inf and NaN stay what they are.
    const int exponent = max(static_cast<int>(largest >> 7), 60);
    const float down = __int_as_float(min(127 + 15 + 126 - exponent, 254) << 23);
    if (lane == 0) shared.q_factor[head] = 1.0f / down;
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      const float2 q = unpack<__nv_bfloat16>(words[w]);
      words[w] = pack<__half>(q.x * down, q.y * down);
    }
    if (has_dims) {
      *first = {words[0], words[2], words[4], words[6]};
      *second = {words[1], words[3], words[5], words[7]};
    }
  }
}

// The result of a head.
template <typename Statistics>
__device__ HeadResult result_of(const Statistics& statistics, int head) {
  float sum = 0.0f, weight = 0.0f;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(Statistics::sum) / sizeof(Statistics::base)); ++w) {
    sum += statistics.sum[w][head];
    weight += statistics.weight[w][head];
  }
  return {sum, weight, statistics.base[head], statistics.max[head]};
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    portable_attention_kernel(const __grid_constant__ AttentionArgs args) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(typename Config::SharedStorage) > most_shared_bytes(__CUDA_ARCH__ / 10)) {
    __trap();  // The host chooses none that has no room where its code was compiled for.
    return;
  }
#endif
  extern __shared__ __align__(128) std::uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::SharedStorage*>(shared_bytes);

  const int split = blockIdx.y;
  const CtaRow where = CtaRow::of<Config>(args);
  if (threadIdx.x == 0) shared.keys.init(args, where.b, where.j);
  if (threadIdx.x < Config::kHeads) {
    shared.base[0][threadIdx.x] = shared.base[1][threadIdx.x] = -kAttentionInf;
  }
  __syncthreads();
  const TileShare share(args, shared.keys.size(), Config::kTokens, split);
  const int begin = share.first, end = begin + share.count;

  AttentionTile<Config> state(shared, args);
  TileLoader<Config> loader(shared, args);
  if (begin < end) {
    if (loader.has_rows()) loader.fetch(begin);
    load_queries<Config>(shared, args, where);
    ptx::cp_async_commit();
    if (loader.has_rows()) {
      loader.locate(begin);
      loader.begin(0);
      for (int part = 0; part < Config::kRowParts; ++part) loader.issue(0, part);
      loader.fetch(begin + 1);
      loader.locate(begin + 1);
    }
    ptx::cp_async_commit();
    if constexpr (Config::kIsFp8) {
      if (threadIdx.x < Config::kProbabilityTiles) shared.scale_exponent[threadIdx.x] = 0;
      ptx::cp_async_wait<1>();  // q
      __syncthreads();
      narrow_queries<Config>(shared);
    }

    for (int tile = begin; tile < end; ++tile) {
      const int stage = (tile - begin) % 2;
      ptx::cp_async_wait<0>();
      __syncthreads();
      const bool has_next = tile + 1 < end;
      const auto copy_next = [&](int part) {
        if (has_next) loader.issue(1 - stage, part);
      };
      if (loader.has_rows() && has_next) loader.begin(1 - stage);
      state.note_scales(stage);
      if constexpr (Config::kLoadWarps == Config::kWarps) {
        state.multiply_qk(stage, copy_next);
      } else if (loader.has_rows()) {
        for (int part = 0; part < Config::kRowParts; ++part) copy_next(part);
      } else {
        state.multiply_qk(stage, [](int) {});
      }
      ptx::cp_async_commit();
      if (loader.has_rows()) loader.fetch(tile + 2);
      if (state.has_keys()) state.publish_maxima(tile);
      __syncthreads();
      if (state.has_keys()) state.publish_probabilities(tile, stage);
      __syncthreads();
      state.multiply_pv(stage);
      if (loader.has_rows()) loader.locate(tile + 2);
    }
  }
  const auto& statistics = state.publish_statistics(end);
  const auto [launch_row, b, j, first_head] = CtaRow::of<Config>(args);
  const std::int64_t partial = (launch_row * args.num_splits + split) * args.num_heads + first_head;
  if (const int head = threadIdx.x; head < Config::kHeads) {
    const HeadResult r = result_of(statistics, head);
    const int h = first_head + head;
    float factor = r.factor();
    if (h >= args.num_heads) {
    } else if (args.num_splits > 1) {
      args.partial_lse[partial + head] = r.lse2;
    } else {
      if (args.sink != nullptr && !r.empty) {
        factor *= share_beside(args.sink[h * args.sink_stride], r.lse());
      }
      args.lse[b * args.lse_stride_b + j * args.lse_stride_j + h * args.lse_stride_h] = r.lse();
      if (args.max_logits != nullptr) {
        args.max_logits[b * args.max_stride_b + j * args.max_stride_j + h * args.max_stride_h] =
            r.max_logit;
      }
    }
    shared.alpha[head] = factor;
  }
  __syncthreads();

  if (args.num_splits > 1) {
    state.store_out([&](int head, int column, float x0, float x1) {
      if (first_head + head >= args.num_heads) return;
      *reinterpret_cast<float2*>(args.partial_out + (partial + head) * args.d_v + column) = {x0,
                                                                                             x1};
    });
    return;
  }

  // Through shared memory, in q's place, so that rows leave in 16 bytes.
  static_assert(kMaxDimV * 2 <= kRowBytes);
  state.store_out([&](int head, int column, float x0, float x1) {
    const std::uint32_t at = swizzled<kRowBytes>(head, column / 8) + column % 8 * 2;
    *reinterpret_cast<std::uint32_t*>(shared.q + at) = pack<typename Config::QueryElement>(x0, x1);
  });
  __syncthreads();
  std::uint16_t* out = args.out + b * args.out_stride_b + j * args.out_stride_j;
  const int out_chunks = args.d_v / 8;
  for (int i = threadIdx.x; i < Config::kHeads * out_chunks; i += Config::kThreads) {
    const int head = i / out_chunks;
    const int chunk = i % out_chunks;
    if (first_head + head >= args.num_heads) break;
    const auto* src =
        reinterpret_cast<const std::uint16_t*>(shared.q + swizzled<kRowBytes>(head, chunk));
    std::uint16_t* dst = out + (first_head + head) * args.out_stride_h + chunk * 8;
    if (args.out_aligned) {
      *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(src);
    } else {
      for (int e = 0; e < 8; ++e) dst[e] = src[e];
    }
  }
}

}  // namespace dsa::cuda
