// SPDX-License-Identifier: Apache-2.0
// The decode kernel's scores: S^T [64 tokens, heads] = K [64, dims] Q^T, by one warpgroup. K goes
// from raw rows through registers, e4m3 -> f16, of V4 times its scale; RoPE is bf16 on both sides.
#pragma once

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/pair.cuh"
#include "cuda/common/unrolled.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdScores {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ explicit KvCacheFwdScores(SharedStorage& shared)
      : shared_(shared), warp_(ptx::thread_index() / 32 % 4), lane_(ptx::thread_index() % 32) {}

  __device__ void run() {
    auto stage = PipelineState<Config::kStages>::consumer_start();
    const int tiles = shared_.tiles;
    for (int tile = 0; tile < tiles; ++tile, stage.advance()) {
      ptx::mbarrier_wait(shared_.full_raw[stage.index], stage.phase);
      multiply(stage);
      if constexpr (kSums == 2) add_sums(stage.index);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_raw[stage.index]);
      if (tile > 0) ptx::named_sync<kEmptyScores, Config::kMathThreads>();
#pragma unroll
      for (int j = 0; j < Config::kHeads / 8; ++j) {
        const float* x = &scores_[0][4 * j];
        shared_.scores[j][32 * warp_ + lane_] = {x[0], x[1], x[2], x[3]};
      }
      ptx::named_arrive<kFullScores, Config::kMathThreads>();
    }
  }

 private:
  static constexpr int kColumns = Config::kHeads / 4;  // of a thread, two rows of each
  static constexpr int kSums = Config::kSums;

  // This thread's two rows.
  __device__ int row(int i) const { return 16 * warp_ + lane_ / 4 + 8 * i; }

  // K q of a tile, 32 dims a step, group after group and RoPE last. V3.2: a group's products are
  // added to a sum whose scale is made that of the group, of RoPE 1. With two sums in turns one is
  // multiplied while products are added to the other. V4: K is multiplied by its scales, powers of
  // two, over the row's largest, and RoPE by one over of_scores. Scales are waited for when one is
  // needed.
  __device__ void multiply(const PipelineState<Config::kStages>& state) {
    const std::uint32_t stage = state.index;
    const std::uint32_t raw = ptx::shared_address(shared_.raw[stage]) +
                              (16 * warp_ + lane_ % 16) * Config::kRowPitch + lane_ / 16 * 16;
    const std::uint32_t rope = raw + Config::kRopeOffset;
    const ptx::WgmmaDescriptor<128> q(shared_.q[0]);
    constexpr int kNopeSteps = Config::kNope / 32;
    constexpr int kGroupSteps = Config::kGroup / 32;
    constexpr int kOperands = Config::kIsV32 ? 3 : 2;  // as there are registers for
    constexpr int kAhead = 2;                          // steps
    static_assert(!Config::kIsV32 || kSums == 1 || kGroupSteps >= kOperands - 1);
    OperandPair operands[kOperands];
    std::uint32_t codes[kAhead + 1][4];
    const auto load = [&](auto step) {
      if constexpr (step < kNopeSteps) {
        ptx::ldmatrix_x4(codes[step % (kAhead + 1)], raw + step * 32);
      } else {  // RoPE's first half, as it is multiplied
        ptx::ldmatrix_x4(codes[step % (kAhead + 1)], rope + (step - kNopeSteps) * 32);
      }
    };
    unrolled<kAhead>(load);
    std::uint32_t scales[2];  // V4: of a group, of this thread's rows
    if constexpr (!Config::kIsV32) ptx::mbarrier_wait(shared_.full_scales[stage], state.phase);
    // V3.2: before products of a group, or RoPE's, are added to a sum of another, it gets their
    // scale.
    const auto take_over = [&](auto turn) {
      if constexpr (Config::kIsV32 && turn >= kSums) {
        if constexpr (turn == kSums) ptx::mbarrier_wait(shared_.full_scales[stage], state.phase);
        if constexpr (kSums == 1) ptx::wgmma_wait<0>();
        times_ratio(scores_[turn % kSums], stage, turn - kSums);
      }
    };
    unrolled<kNopeSteps>([&](auto index) {
      constexpr int step = index;
      constexpr int group = step / kGroupSteps;
      constexpr bool is_first = step % kGroupSteps == 0;  // of the group
      load(std::integral_constant<int, step + kAhead>{});
      if constexpr (!Config::kIsV32 && is_first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scales[i] = shared_.scales[stage].f16[group][row(i)] * 0x10001u;
        }
      }
      OperandPair& a = operands[step % kOperands];
      ptx::wgmma_wait<kOperands - 1>();
      if constexpr (step >= kOperands) a.keep();
      const std::uint32_t (&c)[4] = codes[step % (kAhead + 1)];
      const auto widen = [&](std::uint32_t word, int i, std::uint32_t (&operand)[4]) {
        uint2 wide = ptx::f16x4_from_e4m3x4(word);
        if constexpr (!Config::kIsV32) {
          wide = {times<__half>(wide.x, scales[i]), times<__half>(wide.y, scales[i])};
        }
        operand[i] = wide.x;
        operand[i + 2] = wide.y;
      };
      widen(c[0], 0, a.first);
      widen(c[1], 1, a.first);
      widen(c[2], 0, a.second);
      widen(c[3], 1, a.second);
      constexpr int turn = Config::kIsV32 ? group : step;
      constexpr bool is_fresh = turn < kSums && (is_first || !Config::kIsV32);
      if constexpr (is_first) take_over(std::integral_constant<int, turn>{});
      float (&sum)[2 * kColumns] = scores_[turn % kSums];
      const auto block = q + step / 2 * Config::kBlockBytes + step % 2 * 64;
      ptx::wgmma_fence();
      ptx::wgmma_16_bit<__half>(sum, a.first, block, !is_fresh);
      ptx::wgmma_16_bit<__half>(sum, a.second, block + 32, true);
      ptx::wgmma_commit();
    });
    OperandPair& second_half = operands[kNopeSteps % kOperands];
    ptx::wgmma_wait<kOperands - 1>();
    second_half.keep();
    ptx::ldmatrix_x4(second_half.first, rope + 64);
    ptx::ldmatrix_x4(second_half.second, rope + 96);
    const auto rope_of = [&](auto i) -> std::uint32_t (&)[4] {
      if constexpr (i < kAhead) {
        return codes[(kNopeSteps + i) % (kAhead + 1)];
      } else {
        return i == kAhead ? second_half.first : second_half.second;
      }
    };
    static_assert(Config::kRope == 64 && kAhead == 2);
    if constexpr (!Config::kIsV32) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto scale = __float_as_uint(shared_.scales[stage].of_scores[row(i)]);
        const std::uint32_t inverse = (254u - (scale >> 23)) * 0x800080u;  // bf16
        unrolled<4>([&](auto part) {
          std::uint32_t (&words)[4] = rope_of(part);
          words[i] = times<__nv_bfloat16>(words[i], inverse);
          words[i + 2] = times<__nv_bfloat16>(words[i + 2], inverse);
        });
      }
    }
    constexpr int kRopeTurn = Config::kIsV32 ? Config::kGroups : kNopeSteps;
    take_over(std::integral_constant<int, kRopeTurn>{});
    ptx::wgmma_fence();
    unrolled<4>([&](auto part) {
      ptx::wgmma_16_bit<__nv_bfloat16>(
          scores_[kRopeTurn % kSums], rope_of(part),
          q + (Config::kQueryBlocks - 1) * Config::kBlockBytes + part * 32, true);
    });
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (auto& sum : scores_) ptx::wgmma_result(sum);
    for (OperandPair& a : operands) a.keep();
    unrolled<kAhead>([&](auto part) {
      for (std::uint32_t& word : rope_of(part)) asm volatile("" : "+r"(word)::"memory");
    });
  }

  // V32. The products of `sum` are done: all are, or those of the other sum are more than are
  // pending.
  __device__ void times_ratio(float (&sum)[2 * kColumns], std::uint32_t stage, int group) const {
    const float* ratios = shared_.scales[stage].ratios[group];
    ptx::wgmma_result(sum);
    const float ratio[2] = {ratios[row(0)], ratios[row(1)]};
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      ptx::multiply_in_place(sum[i], ratio[i / 2 % 2]);
    }
  }

  // The second sum is added to the first one; V32: it is of the last group.
  __device__ void add_sums(int stage) {
    float ratio[2] = {1.0f, 1.0f};
    if constexpr (Config::kIsV32) {
      const float* ratios = shared_.scales[stage].ratios[Config::kGroups - 1];
#pragma unroll
      for (int i = 0; i < 2; ++i) ratio[i] = ratios[row(i)];
    }
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      scores_[0][i] = fmaf(scores_[1][i], ratio[i / 2 % 2], scores_[0][i]);
    }
  }

  SharedStorage& shared_;
  const int warp_, lane_;
  float scores_[kSums][2 * kColumns];  // the first becomes the scores
};

}  // namespace dsa::cuda::sm90a
