// SPDX-License-Identifier: Apache-2.0
// The decode kernel's scores: S^T [64 tokens, heads] = K [64, 576] Q^T by one warpgroup, their
// softmax, and P^T for the output. K goes from raw rows through registers, e4m3 -> f16; RoPE is
// bf16 on both sides.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/common/unrolled.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdScores {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // factor: what makes products scores in base 2.
  __device__ KvCacheFwdScores(SharedStorage& shared, float factor)
      : shared_(shared), warp_(threadIdx.x / 32 % 4), lane_(threadIdx.x % 32), factor_(factor) {}

  __device__ void run(int tiles) {
#pragma unroll
    for (float& x : sums_) x = 0.0f;
    auto stage = PipelineState<Config::kStages>::consumer_start();
    auto buffer = PipelineState<2>::producer_start();
    for (int tile = 0; tile < tiles; ++tile, stage.advance(), buffer.advance()) {
      // P of the tile before is published when this one's products have been issued: output's
      // products then run beside the softmax. Unless there are none to issue.
      const bool is_here = ptx::mbarrier_test(shared_.full_scales[stage.index], stage.phase);
      if (!__all_sync(~0u, is_here)) publish();
      ptx::mbarrier_wait(shared_.full_raw[stage.index], stage.phase);
      ptx::mbarrier_wait(shared_.full_scales[stage.index], stage.phase);
      const int exponents[2] = {shared_.exponents[stage.index][row(0)],
                                shared_.exponents[stage.index][row(1)]};
      multiply(stage.index);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_raw[stage.index]);
      const bool moves = named_any<kScoreBarrier, 128>(subtract_bases(stage.index, exponents));
      ptx::mbarrier_wait(shared_.empty_p[buffer.index], buffer.phase);
      if (moves) move_bases(shared_.rescale[buffer.index]);
      if (threadIdx.x == 0) shared_.rescales[buffer.index] = moves ? 1 : 0;
      store_p(buffer.index, exponents);
      stored_ = buffer.index;
    }
    publish();
  }

  // use(head, result of the softmax), a thread a head.
  template <typename Use>
  __device__ void finish(Use&& use) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sums_[i] += __shfl_xor_sync(~0u, sums_[i], mask);
      if (lane_ < 4) shared_.by_warp[warp_][head(i)] = sums_[i];
    }
    sync();
    const int head = threadIdx.x;
    if (head >= Config::kHeads) return;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += shared_.by_warp[w][head];
    const float base = shared_.bases[head];
    use(head, HeadResult(sum, sum, base, sum == 0.0f ? -kAttentionInf : base));
  }

 private:
  static constexpr int kColumns = Config::kHeads / 4;  // of a thread
  static constexpr int kSums = Config::kSums;
  // Scores may be above their base by this much, in powers of two.
  static constexpr float kSlack = 8.0f;

  __device__ static void sync() { named_sync<kScoreBarrier, 128>(); }

  // This thread's two rows, and its columns, of each of which it has both rows.
  __device__ int row(int i) const { return 16 * warp_ + lane_ / 4 + 8 * i; }
  __device__ int head(int column) const { return column / 2 * 8 + lane_ % 4 * 2 + column % 2; }

  // Where a column's score of row 0 stands; that of row 1 two further.
  __device__ float* score(int column) { return &scores_[0][column / 2 * 4 + column % 2]; }

  // K q of a tile, 32 dims a step, RoPE first and then group after group. A group's products are
  // added to a sum whose scale is made that of the group: of RoPE 1. With two sums in turns one is
  // multiplied while products are added to the other.
  __device__ void multiply(int stage) {
    const std::uint32_t raw = ptx::shared_address(shared_.raw[stage]) +
                              (16 * warp_ + lane_ % 16) * Config::kRowBytes + lane_ / 16 * 16;
    const ptx::WgmmaDescriptor<128> q(shared_.q[0]);
    constexpr int kNopeSteps = Config::kNope / 32, kRopeSteps = Config::kRope / 32;
    constexpr int kGroupSteps = Config::kGroup / 32;
    constexpr int kOperands = Config::kHeads == 64 ? 2 : 3;
    constexpr int kAhead = 2;  // steps
    OperandPair operands[kOperands];
    std::uint32_t codes[kAhead + 1][4];
#pragma unroll
    for (int step = 0; step < kRopeSteps; ++step) {
      OperandPair& a = operands[step % kOperands];
      ptx::ldmatrix_x4(a.first, raw + Config::kRopeOffset + step * 64);
      ptx::ldmatrix_x4(a.second, raw + Config::kRopeOffset + step * 64 + 32);
    }
#pragma unroll
    for (int step = 0; step < kAhead; ++step) ptx::ldmatrix_x4(codes[step], raw + step * 32);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRopeSteps; ++step) {
      const OperandPair& a = operands[step % kOperands];
      const auto block = q + (Config::kQueryBlocks - 1) * Config::kBlockBytes + step * 64;
      ptx::wgmma_16_bit<__nv_bfloat16>(scores_[kSums - 1], a.first, block, step > 0);
      ptx::wgmma_16_bit<__nv_bfloat16>(scores_[kSums - 1], a.second, block + 32, true);
      ptx::wgmma_commit();
    }
    static_assert(kRopeSteps <= kOperands);
    unrolled<kNopeSteps>([&](auto index) {
      constexpr int step = index;
      constexpr int group = step / kGroupSteps;
      constexpr bool is_first = step % kGroupSteps == 0;  // of the group
      constexpr int ahead = step + kAhead;
      if constexpr (ahead < kNopeSteps) {
        ptx::ldmatrix_x4(codes[ahead % (kAhead + 1)], raw + ahead * 32);
      }
      OperandPair& a = operands[(step + kRopeSteps) % kOperands];
      ptx::wgmma_wait<kOperands - 1>();
      if constexpr (step + kRopeSteps >= kOperands) a.keep();
      const std::uint32_t (&c)[4] = codes[step % (kAhead + 1)];
      const auto widen = [&](std::uint32_t word, std::uint32_t& low, std::uint32_t& high) {
        const uint2 wide = ptx::f16x4_from_e4m3x4(word);
        low = wide.x;
        high = wide.y;
      };
      widen(c[0], a.first[0], a.first[2]);
      widen(c[1], a.first[1], a.first[3]);
      widen(c[2], a.second[0], a.second[2]);
      widen(c[3], a.second[1], a.second[3]);
      constexpr bool is_fresh = group < kSums - 1;
      float (&sum)[2 * kColumns] = scores_[group % kSums];
      if constexpr (is_first && !is_fresh) {
        if constexpr (kSums == 1) ptx::wgmma_wait<0>();
        times_ratio(sum, shared_.ratios[stage][group]);
      }
      const auto block = q + step / 2 * Config::kBlockBytes + step % 2 * 64;
      ptx::wgmma_fence();
      ptx::wgmma_16_bit<__half>(sum, a.first, block, !(is_first && is_fresh));
      ptx::wgmma_16_bit<__half>(sum, a.second, block + 32, true);
      ptx::wgmma_commit();
    });
    publish();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (auto& sum : scores_) ptx::wgmma_result(sum);
    for (OperandPair& a : operands) a.keep();
  }

  // The products of `sum` are not the last ones, and so are done.
  __device__ void times_ratio(float (&sum)[2 * kColumns], const float* ratios) const {
    ptx::wgmma_result(sum);
    const float ratio[2] = {ratios[row(0)], ratios[row(1)]};
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) sum[i] *= ratio[i / 2 % 2];
  }

  // Scores become those of base 2, plus the row's exponent, which P then has and V has not, less
  // the head's base. Whether some are larger than they may be.
  __device__ bool subtract_bases(int stage, const int (&exponents)[2]) {
    const float plus[2] = {static_cast<float>(exponents[0]), static_cast<float>(exponents[1])};
    const bool has[2] = {exponents[0] != Config::kNoRow, exponents[1] != Config::kNoRow};
    const bool has_all = __all_sync(~0u, has[0] && has[1]);
    float scales[kSums][2];
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scales[sum][i] = shared_.last_scales[stage][sum][row(i)] * factor_;
    }
    float largest = -kAttentionInf;
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      const float2 base = *reinterpret_cast<const float2*>(&shared_.bases[head(c)]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x[2] = {plus[i] - base.x, plus[i] - base.y};
#pragma unroll
        for (int sum = kSums - 1; sum >= 0; --sum) {
          const float* of_sum = &scores_[sum][2 * c + 2 * i];
          x[0] = fmaf(of_sum[0], scales[sum][i], x[0]);
          x[1] = fmaf(of_sum[1], scales[sum][i], x[1]);
        }
        if (!has_all && !has[i]) x[0] = x[1] = -kAttentionInf;
        largest = fmaxf(largest, fmaxf(x[0], x[1]));
        score(c)[2 * i] = x[0];
        score(c)[2 * i + 1] = x[1];
      }
    }
    return largest > (has_bases_ ? kSlack : -kAttentionInf);
  }

  // Bases become the largest scores so far, and stay 0 where there are none; what was summed with
  // the old ones is multiplied by `factors`.
  __device__ void move_bases(float* factors) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      float x = fmaxf(score(c)[0], score(c)[2]);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
      if (lane_ < 4) shared_.by_warp[warp_][head(c)] = x;
    }
    sync();
    if (const int h = threadIdx.x; h < Config::kHeads) {
      float up = has_base_ ? 0.0f : -kAttentionInf;
#pragma unroll
      for (int w = 0; w < 4; ++w) up = fmaxf(up, shared_.by_warp[w][h]);
      const bool has_any = up != -kAttentionInf;  // score so far
      if (!has_any) up = 0.0f;
      shared_.bases[h] += up;
      shared_.ups[h] = up;
      factors[h] = has_base_ ? exp2_approx(-up) : 1.0f;
      has_base_ = has_any;
    }
    has_bases_ = !named_any<kScoreBarrier, 128>(threadIdx.x < Config::kHeads && !has_base_);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float up = shared_.ups[head(c)];
      score(c)[0] -= up;
      score(c)[2] -= up;
      sums_[c] *= factors[head(c)];
    }
  }

  // What was stored of P, if anything.
  __device__ void publish() {
    if (stored_ < 0) return;
    ptx::fence_async_shared();  // for wgmma
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.full_p[stored_]);
    stored_ = -1;
  }

  // P^T as f16, by token, transposed: rows of heads.
  __device__ void store_p(int buffer, const int (&exponents)[2]) {
    float up[2];  // what P lacks of the softmax's summand
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int exponent = exponents[i] == Config::kNoRow ? 0 : exponents[i];
      up[i] = __uint_as_float((127 - exponent) << 23);
    }
    std::uint32_t words[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* x = score(c) + 2 * i;
        const float p0 = exp2_approx(x[0]), p1 = exp2_approx(x[1]);
        sums_[c] = fmaf(p0, up[i], sums_[c]);
        sums_[c + 1] = fmaf(p1, up[i], sums_[c + 1]);
        words[c + i] = pack<__half>(p0, p1);
      }
    }
    // Lane l has the address of row l % 8 of matrix l / 8: 8 heads by 8 tokens.
    const std::uint32_t p = ptx::shared_address(shared_.p[buffer]);
    const std::uint32_t chunk = 2 * warp_ + lane_ / 8 % 2;
    const std::uint32_t address = p + lane_ % 8 * 128 + (chunk ^ lane_ % 8) * 16;
    if constexpr (Config::kHeads == 8) {
      ptx::stmatrix_x2_trans(address, words[0], words[1]);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; c += 4) {
        ptx::stmatrix_x4_trans(address + (c / 2 + lane_ / 16) * 8 * 128, words[c], words[c + 1],
                               words[c + 2], words[c + 3]);
      }
    }
  }

  SharedStorage& shared_;
  const int warp_, lane_;
  const float factor_;
  bool has_base_ = false;              // the head of this thread's number
  bool has_bases_ = false;             // all heads
  int stored_ = -1;                    // which P
  float scores_[kSums][2 * kColumns];  // the first becomes the scores
  float sums_[kColumns];               // of 2^(score - base), over this thread's rows
};

}  // namespace dsa::cuda::sm90a
