// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's mathematics: two warpgroups, each of which has the scores of every
// other block of tokens, and half of the output's dims for all.
#pragma once

#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/named_barrier.cuh"

namespace dsa::cuda::sm90a {

// kOwn: the warpgroup, the block of a tile whose scores it has, and the half of the output.
template <typename Config, int kOwn>
class LatentFwdMath {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  __device__ LatentFwdMath(SharedStorage& shared, float scale_log2, int thread)
      : shared_(shared), scale_log2_(scale_log2), warp_(thread / 32 % 4), lane_(thread % 32) {
#pragma unroll
    for (float& x : out_) x = 0.0f;
  }

  __device__ void run() {
    const int tiles = (shared_.blocks + 1) / 2;
    ptx::mbarrier_wait(shared_.full_q, 0);  // also for nothing: a CTA must not end before
    if (tiles == 0) return;
    if constexpr (kOwn == 0) {
      issue_qk(0);
      finish_qk<0>();
      for (int tile = 0; tile + 1 < tiles; ++tile) run_tile<false>(tile);
      run_tile<true>(tiles - 1);
    } else {
      for (int tile = 0; tile < tiles; ++tile) run_tile(tile);
    }
  }

  // use(head, result), a thread a head; after both warpgroups have run.
  template <typename Use>
  __device__ void finish(Use&& use) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(sums_[i]), weight = quad_sum(weights_[i]);
      if (lane_ % 4 == 0) {
        shared_.sums[kOwn][row(i)] = sum;
        shared_.weights[kOwn][row(i)] = weight;
        shared_.maxima[kOwn][row(i)] = maxima_[i];
        if (kOwn == 1) shared_.bases[1][row(i)] = bases_[i];
      }
    }
    named_sync<LatentFwdBarrier::kMath, Config::kMathThreads>();
    const int head = 32 * warp_ + lane_;
    if (kOwn == 0 && head < Config::kHeads) {
      const auto both = [&](const float (&x)[2][Config::kHeads]) {
        return x[0][head] + x[1][head];
      };
      use(head, HeadResult(both(shared_.sums), both(shared_.weights), shared_.bases[1][head],
                           fmaxf(shared_.maxima[0][head], shared_.maxima[1][head])));
    }
    named_sync<LatentFwdBarrier::kMath, Config::kMathThreads>();
#pragma unroll
    for (int i = 0; i < 2; ++i) factors_[i] = shared_.out_factor[row(i)];
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) {
      const float factor = factors_[i / 2 % 2];
      out_[i] = factor == 0.0f ? 0.0f : out_[i] * factor;  // whatever was summed
    }
  }

  // The output of `heads` heads in fp32, head h's at out + h * 512.
  __device__ void store(float* out, int heads) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row(i) >= heads) continue;
      float* to = out + row(i) * Config::kDimV + kOwn * Config::kHalf + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < Config::kHalf / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {out_[4 * j + 2 * i], out_[4 * j + 2 * i + 1]};
      }
    }
  }

  // The same in 16 bits, head h's at out + h * stride, by way of shared memory.
  __device__ void store(std::uint16_t* out, std::int64_t stride, int heads, bool aligned) const {
    // [heads, 64 dims] four times, swizzled as q; a warp's rows are its own.
    std::uint8_t* staged = shared_.kv[kOwn][0];
#pragma unroll
    for (int block = 0; block < Config::kHalfBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float* x = &out_[32 * block + 4 * j];
        const std::uint32_t words[4] = {pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]),
                                        pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7])};
        ptx::stmatrix_x4(matrix_address(staged + block * Config::kBlockBytes, j), words);
      }
    }
    __syncwarp();
    for (int r = 0; r < 16; ++r) {
      const int head = 16 * warp_ + r;
      if (head >= heads) break;
      const int chunk = lane_ % 8;
      const auto* from = reinterpret_cast<const uint4*>(staged + lane_ / 8 * Config::kBlockBytes +
                                                        head * 128 + (chunk ^ head % 8) * 16);
      std::uint16_t* to = out + head * stride + kOwn * Config::kHalf + lane_ * 8;
      if (aligned) {
        *reinterpret_cast<uint4*>(to) = *from;
      } else {
        const auto* elements = reinterpret_cast<const std::uint16_t*>(from);
        for (int e = 0; e < 8; ++e) to[e] = elements[e];
      }
    }
  }

 private:
  static constexpr int kRopePart = 2;
  static constexpr int kOther = 1 - kOwn;
  // Scores may be above their base by this much, in powers of two.
  static constexpr float kSlack = 8.0f;

  // This thread's two rows: heads.
  __device__ int row(int i) const { return 16 * warp_ + lane_ / 4 + 8 * i; }

  __device__ static float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
  __device__ static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }

  // Of this lane, for stmatrix: 16 rows of the warp, columns 8 j to 8 j + 15, of 128-byte rows.
  __device__ std::uint32_t matrix_address(const std::uint8_t* block, int j) const {
    const int r = 16 * warp_ + lane_ % 16, chunk = j + lane_ / 16;
    return ptx::shared_address(block) + r * 128 + (chunk ^ r % 8) * 16;
  }

  __device__ void let_go(int block, int part) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty[block][part]);
  }

  // The first warpgroup has its next scores while the second one has its softmax, and its softmax
  // while both multiply the second block's values.
  template <bool kIsLast>
  __device__ void run_tile(int tile) {
    attend_own([&] {
      if (tile > 0) let_go_other();
    });
    if constexpr (!kIsLast) issue_qk((tile + 1) % 2);
    sync_other();
    take_over();
    multiply_other();
    if constexpr (kIsLast) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_result(out_);
    } else {
      finish_qk<1>();
    }
  }

  __device__ void run_tile(int tile) {
    sync_other();
    take_over();
    multiply_other();
    issue_qk(tile % 2);
    ptx::wgmma_wait<Config::kParts>();
    let_go_other();
    finish_qk<0>();
    ptx::wgmma_result(out_);
    attend_own([] {});
  }

  // From the scores of this warpgroup's block to its part of the output. then(): as softmax.
  template <typename Then>
  __device__ void attend_own(Then&& then) {
    softmax(then);
    publish_p();
    if (moved_) rescale(factors_);
    multiply_own();
    ptx::wgmma_wait<0>();
    ptx::wgmma_result(out_);
    let_go(kOwn, kOwn);
  }

  __device__ void issue_qk(std::uint32_t phase) {
    const ptx::WgmmaDescriptor<128> q(shared_.q[0]), k(shared_.kv[kOwn][0]);
#pragma unroll
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::mbarrier_wait(shared_.full[kOwn][part], phase);
      ptx::fence_async_shared();  // what cp.async wrote, for wgmma
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Config::dim_blocks(part); ++i) {
        const int block = Config::first_dim_block(part) + i;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const std::uint32_t at = block * Config::kBlockBytes + step * 32;
          ptx::wgmma_16_bit<Element>(scores_, q + at, k + at, block + step > 0);
        }
      }
      ptx::wgmma_commit();
    }
  }

  // kLater: products that were issued since then.
  template <int kLater>
  __device__ void finish_qk() {
    ptx::wgmma_wait<kLater>();
    ptx::wgmma_result(scores_);
  }

  // What multiply_other read.
  __device__ void let_go_other() {
    let_go(kOther, kOwn);
    if constexpr (Config::kRope > 0) let_go(kOther, kRopePart);
  }

  // Scores -> P, in registers as operands of wgmma. Bases move where a score is far above. Half way
  // all products are waited for, and then(); out_ is not to be touched before.
  template <typename Then>
  __device__ void softmax(Then&& then) {
#pragma unroll
    for (float& x : scores_) x *= scale_log2_;
    if (!shared_.all_valid[kOwn]) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (shared_.valid[kOwn][token] == 0) scores_[i] = -kAttentionInf;
      }
    }
    bool above = false;
    float shift[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -kAttentionInf;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        largest = fmaxf(largest, fmaxf(scores_[4 * j + 2 * i], scores_[4 * j + 2 * i + 1]));
      }
      largest = quad_max(largest);
      maxima_[i] = fmaxf(maxima_[i], largest);
      const bool moves = largest > bases_[i] + kSlack;  // also the first one of all
      factors_[i] = moves ? exp2_approx(bases_[i] - largest) : 1.0f;
      if (moves) bases_[i] = largest;
      above |= moves;
      shift[i] = bases_[i] == -kAttentionInf ? 0.0f : bases_[i];
      sums_[i] *= factors_[i];
      weights_[i] *= factors_[i];
    }
    moved_ = __any_sync(~0u, above);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j == 4) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_result(out_);
        then();
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p0 = exp2_approx(scores_[4 * j + 2 * i] - shift[i]);
        const float p1 = exp2_approx(scores_[4 * j + 2 * i + 1] - shift[i]);
        sums_[i] += p0 + p1;
        const std::uint32_t word = pack<Element>(p0, p1);
        const float2 rounded = unpack<Element>(word);
        weights_[i] += rounded.x + rounded.y;
        p_[j / 2][j % 2 * 2 + i] = word;
      }
    }
  }

  // P, and what the other warpgroup needs to know of bases. The block's RoPE has been read by all.
  __device__ void publish_p() {
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        shared_.bases[kOwn][row(i)] = bases_[i];
        shared_.factors[kOwn][row(i)] = factors_[i];
      }
    }
    if (lane_ == 0) shared_.moved[kOwn][warp_] = moved_;
    if constexpr (Config::kRope > 0) named_sync<LatentFwdBarrier::kWarpgroup + kOwn, 128>();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::stmatrix_x4(matrix_address(shared_.p_of(kOwn), 2 * step), p_[step]);
    }
    ptx::fence_async_shared();  // for wgmma
    named_arrive<LatentFwdBarrier::kFullP + kOwn, Config::kMathThreads>();
  }

  // The other block's P, and so its rows, are there.
  __device__ void sync_other() const {
    named_sync<LatentFwdBarrier::kFullP + kOther, Config::kMathThreads>();
    ptx::fence_async_shared();  // what cp.async wrote, for wgmma
  }

  // The other warpgroup's bases become this one's. Without a branch in the first warpgroup, whose
  // scores are on their way: the assembler would wait for them.
  __device__ void take_over() {
    float factors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bases_[i] = shared_.bases[kOther][row(i)];
      factors[i] = shared_.factors[kOther][row(i)];
      sums_[i] *= factors[i];
      weights_[i] *= factors[i];
    }
    if (kOwn == 0 || shared_.moved[kOther][warp_]) rescale(factors);
  }

  __device__ void rescale(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) out_[i] *= factors[i / 2 % 2];
  }

  __device__ ptx::WgmmaRowsDescriptor values(int block) const {
    return {shared_.kv[block][kOwn * Config::kHalfBlocks], Config::kBlockBytes};
  }
  static constexpr int kStepBytes = 16 * 128;  // of 16 tokens

  __device__ void multiply_own() {
    const ptx::WgmmaRowsDescriptor v = values(kOwn);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma_rows<Element>(out_, p_[step], v + step * kStepBytes);
    }
    ptx::wgmma_commit();
  }

  __device__ void multiply_other() {
    const ptx::WgmmaDescriptor<128> p(shared_.p_of(kOther));
    const ptx::WgmmaRowsDescriptor v = values(kOther);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma_rows<Element>(out_, p + step * 32, v + step * kStepBytes);
    }
    ptx::wgmma_commit();
  }

  SharedStorage& shared_;
  const float scale_log2_;
  const int warp_, lane_;
  float bases_[2] = {-kAttentionInf, -kAttentionInf};
  float maxima_[2] = {-kAttentionInf, -kAttentionInf};
  float sums_[2] = {}, weights_[2] = {};  // of 2^(score - base), and of the same in 16 bits
  float factors_[2];
  bool moved_ = false;  // a base of this warp
  float scores_[32];
  std::uint32_t p_[4][4];
  float out_[Config::kHalf / 2];
};

}  // namespace dsa::cuda::sm90a
