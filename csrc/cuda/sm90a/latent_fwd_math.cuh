// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's mathematics: two warpgroups, each of which has the scores of every
// other block of tokens, and half of the output's dims for all.
#pragma once

#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_output.cuh"
#include "cuda/sm90a/latent_fwd_softmax.cuh"

namespace dsa::cuda::sm90a {

// kOwn: the warpgroup, the block of a tile whose scores it has, and the half of the output.
template <typename Config, int kOwn>
class LatentFwdMath {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  __device__ LatentFwdMath(SharedStorage& shared, const float& scale_log2, int thread)
      : shared_(shared), scale_log2_(scale_log2), warp_(thread / 32 % 4), lane_(thread % 32) {}

  // The n-th work of this CTA, up to finish(). The first warpgroup has its next scores, also those
  // of the next work, before the second block's P is there; the second one half of its scores
  // before the first block's P is.
  __device__ void run(std::uint32_t n, bool is_last) {
    begin();
    if constexpr (kOwn == 0) {
      if (tiles_ < 0) {
        wait_for_q(n);
        if (tiles_ > 0) {
          issue_qk<0, Config::kParts>(true);
          finish_qk<0>(true);
        }
      }
      if (n > 0) ptx::named_sync<LatentFwdBarrier::kStored, Config::kMathThreads>();
      int left = tiles_;
      const bool has_tiles = left > 0;
      tiles_ = -1;
      if (!has_tiles) let_go_q();
      for (bool is_first = true; left > 0; --left, is_first = false) {
        attend_own(!is_first);
        bool has_next = left > 1;
        if (!has_next) {
          let_go_q();
          if (!is_last) {
            wait_for_q(n + 1);
            has_next = tiles_ > 0;
          }
        }
        issue_qk<0, Config::kParts>(has_next);
        take_over();
        multiply<kOther>();
        finish_qk<Config::kHalfParts>(has_next);
      }
      finish_other(has_tiles);
    } else {
      wait_for_q(n);
      if (tiles_ == 0) let_go_q();
      for (int left = tiles_; left > 0; --left) {
        issue_qk<0, kEarlyParts>(true);
        take_over();
        multiply<kOther>();
        finish<kOther>();
        issue_qk<kEarlyParts, Config::kParts>(true);
        finish_qk<0>(true);
        if (left == 1) let_go_q();
        attend_own(false);
      }
    }
  }

  // After run(). use(head, result): a thread a head; the factor of its output.
  template <typename Use>
  __device__ void finish(Use&& use) {
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = quad_sum(sums_[i]);
      if (kOwn == 1 && lane_ % 4 == 0) {
        shared_.math.sums[row(i)] = sums[i];
        shared_.math.weights[row(i)] = weights_[2 * i];
        shared_.math.maxima[row(i)] = maxima_[i];
      }
    }
    ptx::named_sync<LatentFwdBarrier::kMath, Config::kMathThreads>();
    if (kOwn == 0 && lane_ % 4 < 2) {
      const bool second = lane_ % 2 != 0;
      const auto mine = [&](float x, float y) { return second ? y : x; };
      const int head = row(second ? 1 : 0);
      shared_.math.out_factor[head] =
          use(head, HeadResult(mine(sums[0], sums[1]) + shared_.math.sums[head],
                               mine(weights_[0], weights_[2]) + shared_.math.weights[head],
                               mine(bases_[0], bases_[1]),
                               fmaxf(mine(maxima_[0], maxima_[1]), shared_.math.maxima[head])));
    }
    __syncwarp();
    ptx::named_sync<LatentFwdBarrier::kMath, Config::kMathThreads>();
#pragma unroll
    for (int i = 0; i < 2; ++i) factors_[i] = shared_.math.out_factor[row(i)];
    if (factors_[0] < 0.0f || factors_[1] < 0.0f) {  // whatever was summed
#pragma unroll
      for (int i = 0; i < Config::kHalf / 2; ++i) {
        if (factors_[i / 2 % 2] < 0.0f) output(i) = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) output(i) *= factors_[i / 2 % 2];
  }

  // The output of `heads` heads, in fp32 and in 16 bits.
  __device__ void store(float* out, int heads) const {
    stored().store(out, heads, [&](int i) { return output(i); });
  }
  __device__ void store(std::uint16_t* out, std::int64_t stride, int heads) const {
    stored().store(out, stride, heads, shared_.p[0], [&](int i) { return output(i); });
  }

  // After the last store of a work.
  __device__ void end(bool is_last) const {
    if (kOwn == 1 && !is_last) ptx::named_arrive<LatentFwdBarrier::kStored, Config::kMathThreads>();
  }

 private:
  static constexpr int kOther = 1 - kOwn;
  // Parts of the second block that are there before the first one's P: RoPE, and what this
  // warpgroup alone lets go of.
  static constexpr int kEarlyParts = (Config::kRope > 0 ? 1 : 0) + Config::kHalfParts;

  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bases_[i] = maxima_[i] = -kAttentionInf;
      sums_[i] = 0.0f;
    }
#pragma unroll
    for (float& x : weights_) x = 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) output(i) = 0.0f;
  }

  __device__ LatentFwdOutput<Config> stored() const { return {kOwn, warp_, lane_}; }
  __device__ int row(int i) const { return stored().row(i); }

  // Of this lane, for stmatrix: 16 rows of the warp, columns 8 j to 8 j + 15, of 128-byte rows.
  __device__ std::uint32_t matrix_address(const std::uint8_t* block, int j) const {
    const int r = 16 * warp_ + lane_ % 16, chunk = j + lane_ / 16;
    return ptx::shared_address(block) + r * 128 + (chunk ^ r % 8) * 16;
  }

  __device__ void let_go_q() {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_q[0]);
  }

  __device__ void let_go(int block, int part) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty[block][part]);
  }

  __device__ void wait_for_q(std::uint32_t n) {
    ptx::mbarrier_wait(shared_.full_q[0], n % 2);
    tiles_ = shared_.blocks[0];
  }

  // From the scores of this warpgroup's block to its part of the output.
  __device__ void attend_own(bool lets_go_other) {
    softmax();
    publish_p();
    finish_other(lets_go_other);
    if (moved_) rescale(factors_);
    multiply<kOwn>();
    finish<kOwn>();
  }

  // Some parts of this warpgroup's next block; if there is none, of whatever is there: the
  // assembler would have products on their way wait for each other if they were issued by a branch.
  template <int kFirst, int kEnd>
  __device__ void issue_qk(bool is_there) {
    const ptx::WgmmaDescriptor<128> q(shared_.q[0][0]), k(shared_.kv[kOwn][0]);
#pragma unroll
    for (int n = kFirst; n < kEnd; ++n) {
      const int part = Config::part_at(kOwn, n);
      if (is_there) ptx::mbarrier_wait(shared_.full[kOwn][part], phase_);
      ptx::fence_async_shared();  // what cp.async wrote, for wgmma
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Config::dim_blocks(part); ++i) {
        const int block = Config::first_dim_block(part) + i;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const std::uint32_t at = block * Config::kBlockBytes + step * 32;
          ptx::wgmma_16_bit<Element>(scores_, q + at, k + at, n + i + step > 0);
        }
      }
      ptx::wgmma_commit();
    }
    if constexpr (kEnd < Config::kParts) return;
    phase_ ^= is_there ? 1 : 0;
    lacks_ = shared_.lacks[kOwn].any != 0;
  }

  // kLater: products that were issued since then.
  template <int kLater>
  __device__ void finish_qk(bool is_there) {
    ptx::wgmma_wait<kLater>();
    ptx::wgmma_result(scores_);
    if (Config::kRope > 0 && is_there) let_go(kOwn, Config::kRopePart);
  }

  // The output, of the products with a block's values; lets go of what they read part by part.
  template <int kBlock>
  __device__ void finish() {
    static_assert(Config::kHalfParts == 2);
    ptx::wgmma_wait<1>();
    let_go(kBlock, first_part());
    ptx::wgmma_wait<0>();
    take_output();
    let_go(kBlock, first_part() + 1);
  }

  // The same of the other block, all at once.
  __device__ void finish_other(bool lets_go) {
    ptx::wgmma_wait<0>();
    take_output();
    if (!lets_go) return;
#pragma unroll
    for (int i = 0; i < Config::kHalfParts; ++i) let_go(kOther, first_part() + i);
  }

  __device__ static constexpr int first_part() { return kOwn * Config::kHalfParts; }

  __device__ void take_output() {
    for (auto& part : out_) ptx::wgmma_result(part);
    ptx::wgmma_result(weights_);
  }

  // Scores -> P, in registers as operands of wgmma. Bases move where a score is far above. On the
  // way the other block's products are waited for; out_ is not to be touched before.
  __device__ void softmax() {
    if (lacks_) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (shared_.valid[kOwn][token] == 0) scores_[i] = -kAttentionInf;
      }
    }
    float largest[2];
    row_maxima(scores_, largest);
    bool above = false;
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] *= scale_log2_;
      maxima_[i] = fmaxf(maxima_[i], largest[i]);
      const bool moves = largest[i] - bases_[i] > kLatentSlack;  // also the first one of all
      factors_[i] = moves ? ptx::exp2_approx(bases_[i] - largest[i]) : 1.0f;
      if (moves) bases_[i] = largest[i];
      above |= moves;
      shift[i] = bases_[i] == -kAttentionInf ? 0.0f : bases_[i];
      sums_[i] *= factors_[i];
    }
    moved_ = __any_sync(~0u, above);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = ptx::exp2_approx(fmaf(scores_[4 * j + 2 * i], scale_log2_, -shift[i]));
        const float p1 = ptx::exp2_approx(fmaf(scores_[4 * j + 2 * i + 1], scale_log2_, -shift[i]));
        sums_[i] += p0 + p1;
        p_[j / 2][j % 2 * 2 + i] = pack<Element>(p0, p1);
      }
    }
  }

  // P, and what the other warpgroup needs to know of bases.
  __device__ void publish_p() {
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shared_.math.bases[kOwn][row(i)] = bases_[i];
        shared_.math.factors[kOwn][row(i)] = factors_[i];
      }
    }
    if (lane_ == 0) shared_.math.moved[kOwn][warp_] = moved_;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::stmatrix_x4(matrix_address(shared_.p[0], 2 * step), p_[step]);
    }
    ptx::named_arrive<LatentFwdBarrier::kFullP + kOwn, Config::kMathThreads>();
  }

  // The other block's P, whose rows are there too, for this warpgroup's wgmma as for the other's;
  // and the other's bases become this one's. Warps read what the same warp of the other one has
  // written.
  __device__ void take_over() {
    ptx::named_sync<LatentFwdBarrier::kFullP + kOther, Config::kMathThreads>();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::ldmatrix_x4(p_[step], matrix_address(shared_.p[0], 2 * step));
    }
    float factors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bases_[i] = shared_.math.bases[kOther][row(i)];
      factors[i] = shared_.math.factors[kOther][row(i)];
      sums_[i] *= factors[i];
    }
    if (shared_.math.moved[kOther][warp_]) {
      ptx::wgmma_wait<0>();  // scores may be on their way, and would be waited for on both ways
      rescale(factors);
    }
  }

  __device__ void rescale(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) output(i) *= factors[i / 2 % 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights_[i] *= factors[i / 2];
  }

  __device__ ptx::WgmmaRowsDescriptor values(int block) const {
    return {shared_.kv[block][kOwn * Config::kHalfBlocks], Config::kBlockBytes};
  }
  static constexpr int kStepBytes = 16 * 128;  // of 16 tokens
  static constexpr int kPartBytes = Config::kPartBlocks * Config::kBlockBytes;

  // P of a block, in registers, with its values; its own also with ones, for the sums of P.
  template <int kBlock>
  __device__ void multiply() {
    const ptx::WgmmaRowsDescriptor v = values(kBlock);
    const ptx::WgmmaDescriptor<32> ones(shared_.math.ones);
    ptx::wgmma_fence();
    if constexpr (kBlock == kOwn) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_16_bit<Element>(weights_, p_[step], ones, true);
      }
    }
#pragma unroll
    for (int part = 0; part < Config::kHalfParts; ++part) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_rows<Element>(out_[part], p_[step], v + part * kPartBytes + step * kStepBytes);
      }
      ptx::wgmma_commit();
    }
  }

  // As LatentFwdOutput has them.
  __device__ float& output(int i) { return out_[i / kPartSums][i % kPartSums]; }
  __device__ float output(int i) const { return out_[i / kPartSums][i % kPartSums]; }
  static constexpr int kPartSums = Config::kPartDims / 2;

  SharedStorage& shared_;
  const float& scale_log2_;  // above 0; among the arguments, to leave registers
  const int warp_, lane_;
  std::uint32_t phase_ = 0;  // of this warpgroup's block
  int tiles_ = -1;           // of the work that q has been waited for, if any
  float bases_[2], maxima_[2];
  float sums_[2];     // of 2^(score - base), of this thread's scores
  float weights_[4];  // of P, two columns of each row, as all others
  float factors_[2];
  bool lacks_;          // tokens, its block
  bool moved_ = false;  // a base of this warp
  float scores_[32];
  std::uint32_t p_[4][4];
  float out_[Config::kHalfParts][kPartSums];
};

}  // namespace dsa::cuda::sm90a
