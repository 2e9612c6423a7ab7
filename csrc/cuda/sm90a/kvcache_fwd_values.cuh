// SPDX-License-Identifier: Apache-2.0
// The decode kernel's output: out^T [256 dims, heads] += V^T [256 dims, 64 tokens] P^T, by a
// warpgroup. V^T goes from raw rows through registers: transposed by ldmatrix, e4m3 -> f16, times
// its scale; V4's RoPE as it is, with a P of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"
#include "cuda/sm90a/kvcache_fwd_softmax.cuh"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdValues {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // factor: what makes products scores in base 2. half: which 256 of the dims.
  __device__ KvCacheFwdValues(SharedStorage& shared, float factor, int half)
      : shared_(shared),
        half_(half),
        warp_(ptx::thread_index() / 32 % 4),
        lane_(ptx::thread_index() % 32),
        softmax_(shared, factor, half_, warp_, lane_) {}

  __device__ void run() {
#pragma unroll
    for (int m = 0; m < Config::kValueTiles; ++m) {
#pragma unroll
      for (float& x : out_[m]) x = 0.0f;
    }
    auto stage = PipelineState<Config::kStages>::consumer_start();
    for (int tile = 0; tile < shared_.tiles; ++tile, stage.advance()) {
      ptx::mbarrier_wait(shared_.full_raw[stage.index], stage.phase);
      // All are here: P before is read.
      ptx::named_sync<kFullScores, Config::kMathThreads>();
      const bool moves = softmax_.make_p(stage.index, tile + 1 == shared_.tiles);
      if (moves && tile > 0) rescale();
      if (has_rope()) {
        multiply<true>(stage.index);
      } else {
        multiply<false>(stage.index);
      }
    }
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
  }

  // After run; as KvCacheFwdSoftmax::finish.
  template <typename Use>
  __device__ void finish(Use&& use) {
    softmax_.finish(use);
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
  }

  // The output as it was summed, fp32, into shared memory: nothing before the scales is needed
  // there any more.
  __device__ void stage() const {
    static_assert(Config::kHeads * Config::kDimV * 4 <= offsetof(SharedStorage, scales));
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      // Of the first eight heads and 64 dims; others are multiples of both further.
      const int head = lane_ % 4 * 2 + odd, dim = first_dim(0) + lane_ / 4 * 2;
      float* to = &staged(shared_, head, dim / 4 * 4)->x + dim % 4;
#pragma unroll
      for (int j = 0; j < Config::kHeads / 8; ++j) {
#pragma unroll
        for (int m = 0; m < Config::kValueTiles; ++m) {
          if (m == kRopeTile && has_rope()) continue;
          const float* x = &out_[m][4 * j + odd];  // of a dim, and of the next
          *reinterpret_cast<float2*>(to + 8 * j * Config::kDimV + 64 * m) = {x[0], x[2]};
        }
      }
      if (has_rope()) {
        constexpr float kUp = 1 << Config::kScaleBits;  // as the others are
#pragma unroll
        for (int more = 0; more < 2; ++more) {
          const int d = first_dim(kRopeTile) + lane_ / 4 + 8 * more;
          float* of_dim = &staged(shared_, head, d / 4 * 4)->x + d % 4;
#pragma unroll
          for (int j = 0; j < Config::kHeads / 8; ++j) {
            of_dim[8 * j * Config::kDimV] = out_[kRopeTile][4 * j + odd + 2 * more] * kUp;
          }
        }
      }
    }
  }

  // Four dims of a head that is staged; eight heads' are in different banks.
  __device__ static float4* staged(SharedStorage& shared, int head, int dim) {
    float* of_head = reinterpret_cast<float*>(shared.q[0]) + head * Config::kDimV;
    return reinterpret_cast<float4*>(of_head + (dim ^ head % 8 * 4));
  }

  // The output of `heads` heads, bf16 or fp32, head h's at out + h * stride, by way of shared
  // memory.
  template <typename Element>
  __device__ void store(Element* out, std::int64_t stride, int heads, bool aligned) const {
    stage();
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
    constexpr int kWarps = Config::kValueThreads / 32;
    constexpr int kCount = 16 / static_cast<int>(sizeof(Element));  // elements of 16 bytes
    constexpr int kTurns = Config::kDimV / (32 * kCount);
    for (int head = 4 * half_ + warp_; head < heads; head += kWarps) {
      const float factor = shared_.out_factor[head];
      Element* to = out + head * stride + lane_ * kCount;
      float x[kTurns][kCount];
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
#pragma unroll
        for (int k = 0; k < kCount; k += 4) {
          *reinterpret_cast<float4*>(&x[i][k]) =
              *staged(shared_, head, (32 * i + lane_) * kCount + k);
        }
      }
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
#pragma unroll
        for (float& y : x[i]) y = factor < 0.0f ? 0.0f : y * factor;  // whatever was summed
        store_16_bytes(to + 32 * i * kCount, x[i], aligned);
      }
    }
  }

 private:
  static constexpr int kTileTokens = 16;  // of a step

  __device__ static void store_16_bytes(float* to, const float (&x)[4], bool) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  }
  __device__ static void store_16_bytes(__nv_bfloat16* to, const float (&x)[8], bool aligned) {
    const uint4 packed = {pack<__nv_bfloat16>(x[0], x[1]), pack<__nv_bfloat16>(x[2], x[3]),
                          pack<__nv_bfloat16>(x[4], x[5]), pack<__nv_bfloat16>(x[6], x[7])};
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = packed;
    } else {
      const auto* elements = reinterpret_cast<const __nv_bfloat16*>(&packed);
      for (int i = 0; i < 8; ++i) to[i] = elements[i];
    }
  }

  // Of this warp's part of 64 dims.
  __device__ int first_dim(int m) const {
    return (half_ * Config::kValueTiles + m) * 64 + warp_ * 16;
  }

  __device__ void rescale() {
#pragma unroll
    for (int j = 0; j < Config::kHeads / 8; ++j) {
      const float2 factor =
          *reinterpret_cast<const float2*>(&shared_.factors[8 * j + lane_ % 4 * 2]);
#pragma unroll
      for (int m = 0; m < Config::kValueTiles; ++m) {
        out_[m][4 * j] *= factor.x;
        out_[m][4 * j + 1] *= factor.y;
        out_[m][4 * j + 2] *= factor.x;
        out_[m][4 * j + 3] *= factor.y;
      }
    }
  }

  // V4: whether this warpgroup's last tile is RoPE, of which a thread's rows are dims g and g + 8
  // of a warp's; else they are 2 g and 2 g + 1.
  __device__ bool has_rope() const { return !Config::kIsV32 && half_ == 1; }
  static constexpr int kRopeTile = Config::kValueTiles - 1;

  // A step has 16 tokens and 128 dims: two tiles of the output, so that its two products do not
  // depend on each other. The first one's V is made before P is waited for.
  template <bool kHasRope>
  __device__ void multiply(int stage) {
    const std::uint32_t raw = ptx::shared_address(shared_.raw[stage]) +
                              lane_ % 16 * Config::kRowPitch + first_dim(0) + lane_ / 16 * 64;
    const std::uint32_t rope = ptx::shared_address(shared_.raw[stage]) +
                               (lane_ / 16 * 8 + lane_ % 8) * Config::kRowPitch +
                               Config::kRopeOffset + 32 * warp_ + lane_ / 8 % 2 * 16;
    const ptx::WgmmaDescriptor<128> p(shared_.p[0]);
    constexpr int kPairs = Config::kValueTiles / 2;  // of tiles
    constexpr int kSteps = Config::kTokens / kTileTokens * kPairs;
    OperandPair operands[2];
    constexpr int kAhead = 2;  // steps
    std::uint32_t codes[kAhead + 1][4];
    const auto load = [&](int step) {
      const int pair = step % kPairs, tokens = step / kPairs * kTileTokens;
      ptx::ldmatrix_x4_trans(codes[step % (kAhead + 1)],
                             raw + tokens * Config::kRowPitch + pair * 128);
    };
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load(step);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int pair = step % kPairs, tokens = step / kPairs * kTileTokens;
      if (step + kAhead < kSteps) load(step + kAhead);
      const auto scales_of = [&](int tile) {
        const int dim = (half_ * Config::kValueTiles + tile) * 64;
        const auto* pairs = reinterpret_cast<const std::uint32_t*>(
            &shared_.scales[stage].f16[dim / Config::kGroup][tokens + lane_ % 4 * 2]);
        return uint2{pairs[0], pairs[4]};
      };
      const uint2 scales = scales_of(2 * pair);
      OperandPair& a = operands[step % 2];
      ptx::wgmma_wait<1>();
      if (step >= 2) a.keep();
      const std::uint32_t (&c)[4] = codes[step % (kAhead + 1)];
      // Two dims of two tokens -> two tokens of each dim.
      const auto widen = [&](std::uint32_t word, std::uint32_t scale, std::uint32_t& even,
                             std::uint32_t& odd) {
        const uint2 wide = ptx::f16x4_from_e4m3x4(__byte_perm(word, 0, 0x3120));
        even = times<__half>(wide.x, scale);
        odd = times<__half>(wide.y, scale);
      };
      const bool is_rope = kHasRope && 2 * pair + 1 == kRopeTile;
      widen(c[0], scales.x, a.first[0], a.first[1]);
      widen(c[1], scales.y, a.first[2], a.first[3]);
      if (is_rope) {
        ptx::ldmatrix_x4_trans(a.second, rope + tokens * Config::kRowPitch);
      } else {
        const uint2 seconds = Config::kIsV32 ? scales : scales_of(2 * pair + 1);
        widen(c[2], seconds.x, a.second[0], a.second[1]);
        widen(c[3], seconds.y, a.second[2], a.second[3]);
      }
      if (step == 0) ptx::named_sync<kValueBarrier, Config::kValueThreads>();
      ptx::wgmma_fence();
      ptx::wgmma_16_bit<__half>(out_[2 * pair], a.first, p + tokens * 2, true);
      float (&second)[Config::kHeads / 2] = out_[2 * pair + 1];
      if (is_rope) {
        ptx::wgmma_16_bit<__nv_bfloat16>(second, a.second, p + Config::kBlockBytes + tokens * 2,
                                         true);
      } else {
        ptx::wgmma_16_bit<__half>(second, a.second, p + tokens * 2, true);
      }
      ptx::wgmma_commit();
    }
    __syncwarp();  // the rows have been read
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_raw[stage]);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Config::kValueTiles; ++m) ptx::wgmma_result(out_[m]);
    operands[0].keep();
    operands[1].keep();
  }

  SharedStorage& shared_;
  const int half_, warp_, lane_;
  KvCacheFwdSoftmax<Config> softmax_;
  float out_[Config::kValueTiles][Config::kHeads / 2];
};

}  // namespace dsa::cuda::sm90a
