// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's mathematics with few heads: a warpgroup that has work for itself,
// scores, softmax and output.
#pragma once

#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_few_config.h"

namespace dsa::cuda::sm90a {

// S^T [64 tokens, heads] = K Q^T; out^T [512, heads] += V^T P^T. A thread has a quarter of the
// heads, of each two tokens and 16 dims. kOwn: the worker, and its place.
template <typename Config, int kOwn>
class LatentFewMath {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  __device__ LatentFewMath(SharedStorage& shared, const float& scale_log2, int thread)
      : shared_(shared), scale_log2_(scale_log2), warp_(thread / 32 % 4), lane_(thread % 32) {}

  // The n-th work, up to finish().
  __device__ void run(std::uint32_t n) {
    begin();
    ptx::mbarrier_wait(shared_.full_q[kOwn], n % 2);
    int left = shared_.blocks[kOwn];
    if (left == 0) let_go_q();
    for (; left > 0; --left) {
      multiply_k();
      if (left == 1) let_go_q();
      softmax();
      multiply_v();
    }
  }

  // After run(). use(head, result): a thread a head; the factor of its output.
  template <typename Use>
  __device__ void finish(Use&& use) {
    sync();  // P is read
    auto& heads = *reinterpret_cast<typename Config::Heads*>(shared_.p[kOwn]);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float sum = over_tokens(sums_[i], plus);
      const float largest = over_tokens(maxima_[i], fmaxf);
      if (lane_ >= 4) continue;
      heads.sums[warp_][head(i)] = sum;
      heads.maxima[warp_][head(i)] = largest;
      if (warp_ == 0) heads.factors[head(i)] = bases_[i];
    }
    sync();
    const int h = 32 * warp_ + lane_;
    if (h < Config::kHeads) {
      float sum = 0.0f, largest = -kAttentionInf;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        sum += heads.sums[warp][h];
        largest = fmaxf(largest, heads.maxima[warp][h]);
      }
      heads.factors[h] = use(h, HeadResult(sum, heads.factors[h], largest));
    }
    sync();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float factor = heads.factors[head(i)];
#pragma unroll
      for (auto& tile : out_) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          float& x = tile[i / 2 * 4 + i % 2 + k];
          x = factor < 0.0f ? 0.0f : x * factor;  // whatever was summed
        }
      }
    }
    sync();  // factors are read
  }

  // The output of `heads` heads in fp32, head h's at out + h * 512.
  __device__ void store(float* out, int heads) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int h = head(mine(i));
      if (h >= heads) continue;
      float* to = out + h * Config::kDimV + 16 * warp_ + lane_ / 4 + i / 2 % 2 * 8;
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) to[64 * m] = out_[m][i];
    }
  }

  // The same in 16 bits, head h's at out + h * stride, on 16 bytes: by way of shared memory, where
  // a warp has 16 dims of all heads at a time.
  __device__ void store(std::uint16_t* out, std::int64_t stride, int heads) const {
    constexpr int kRowBytes = 2 * 16;
    static_assert(4 * Config::kHeads * kRowBytes <= sizeof(shared_.p[kOwn]));
    std::uint8_t* staged = shared_.p[kOwn] + warp_ * Config::kHeads * kRowBytes;
    const std::uint32_t address =
        ptx::shared_address(staged) + lane_ % 8 * kRowBytes + lane_ / 8 % 2 * 16;
#pragma unroll
    for (int m = 0; m < kDimTiles; ++m) {
      std::uint32_t words[kSums / 2];
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        words[i] = pack<Element>(out_[m][2 * i], out_[m][2 * i + 1]);
      }
      store_transposed(words, address, 8 * kRowBytes);
      __syncwarp();
#pragma unroll
      for (int first = 0; first < Config::kHeads; first += 16) {
        const int h = first + lane_ / 2;
        if (h >= heads) continue;
        *reinterpret_cast<uint4*>(out + h * stride + 64 * m + 16 * warp_ + lane_ % 2 * 8) =
            *reinterpret_cast<const uint4*>(staged + h * kRowBytes + lane_ % 2 * 16);
      }
      __syncwarp();
    }
  }

 private:
  static constexpr int kSums = Config::kHeads / 2;  // of a thread and 64 tokens, or dims
  static constexpr int kMine = Config::kHeads / 4;  // heads of a thread
  static constexpr int kDimTiles = Config::kDimV / 64;
  // Scores may be above their base by this much, in powers of two.
  static constexpr float kSlack = 8.0f;

  static constexpr int kBarrier = LatentFewBarrier::kMath + kOwn;
  __device__ static void sync() { ptx::named_sync<kBarrier, 128>(); }

  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      bases_[i] = maxima_[i] = -kAttentionInf;
      sums_[i] = 0.0f;
    }
#pragma unroll
    for (auto& tile : out_) {
#pragma unroll
      for (float& x : tile) x = 0.0f;
    }
  }

  // Of this thread's: whose the i-th sum is, and which head that is. Its row is
  // 16 warp + lane / 4 + 8 (i / 2 % 2).
  __device__ static constexpr int mine(int i) { return i / 4 * 2 + i % 2; }
  __device__ int head(int mine) const { return mine / 2 * 8 + lane_ % 4 * 2 + mine % 2; }

  __device__ static float plus(float x, float y) { return x + y; }
  // Over the lanes that have the same heads.
  template <typename Combine>
  __device__ static float over_tokens(float x, Combine&& combine) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
  }

  __device__ void let_go_q() {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty_q[kOwn]);
  }
  __device__ void let_go(int part) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(shared_.empty[kOwn][part]);
  }

  // The scores of the next block.
  __device__ void multiply_k() {
    const ptx::WgmmaDescriptor<128> q(shared_.q[kOwn][0]), k(shared_.kv[kOwn][0]);
#pragma unroll
    for (int n = 0; n < Config::kParts; ++n) {
      const int part = Config::part_at(n);
      ptx::mbarrier_wait(shared_.full[kOwn][part], phase_);
      ptx::fence_async_shared();  // what cp.async wrote, for wgmma
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < Config::dim_blocks(part); ++i) {
        const int block = Config::first_dim_block(part) + i;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_few<Element>(scores_, k + (block * Config::kBlockBytes + step * 32),
                                  q + (block * Config::kHeadBlockBytes + step * 32),
                                  n + i + step > 0);
        }
      }
      ptx::wgmma_commit();
    }
    phase_ ^= 1;
    const bool lacks = shared_.lacks[kOwn].any != 0;
    ptx::wgmma_wait<0>();
    ptx::wgmma_result(scores_);
    if (Config::kRope > 0) let_go(Config::kRopePart);
    if (!lacks) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (shared_.valid[kOwn][16 * warp_ + lane_ / 4 + i / 2 % 2 * 8] == 0) {
        scores_[i] = -kAttentionInf;
      }
    }
  }

  // Scores -> P in shared memory. A head's base is the same in all threads that have it, and moves
  // where a score is far above.
  __device__ void softmax() {
    bool above = false;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float largest = fmaxf(score(i, 0), score(i, 1)) * scale_log2_;
      maxima_[i] = fmaxf(maxima_[i], largest);
      above |= largest - bases_[i] > kSlack;
    }
    if (ptx::named_any<kBarrier, 128>(above)) move_bases();  // and P before is read
    make_p();
    sync();
  }

  __device__ float score(int mine, int second) const {
    return scores_[mine / 2 * 4 + mine % 2 + 2 * second];
  }

  __device__ void make_p() {
    std::uint32_t words[kSums / 2];
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      float p[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float base = bases_[mine(2 * i + k)];
        const float shift = base == -kAttentionInf ? 0.0f : base;
        p[k] = ptx::exp2_approx(fmaf(scores_[2 * i + k], scale_log2_, -shift));
        sums_[mine(2 * i + k)] += p[k];
      }
      words[i] = pack<Element>(p[0], p[1]);
    }
    // Lane l has the address of row l % 8 of matrix l / 8: 8 heads by 8 tokens.
    const std::uint32_t chunk = 2 * warp_ + lane_ / 8 % 2;
    const std::uint32_t address =
        ptx::shared_address(shared_.p[kOwn]) + lane_ % 8 * 128 + (chunk ^ lane_ % 8) * 16;
    store_transposed(words, address, 8 * 128);
    ptx::fence_async_shared();  // for wgmma
  }

  // Matrices of 8 heads, two of them side by side; `address` is this lane's in the first 8 heads.
  __device__ void store_transposed(const std::uint32_t (&words)[kSums / 2], std::uint32_t address,
                                   int eight_heads) const {
    if constexpr (Config::kHeads == 8) {
      ptx::stmatrix_x2_trans(address, words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kSums / 2; i += 4) {
        ptx::stmatrix_x4_trans(address + (i / 2 + lane_ / 16) * eight_heads, words[i], words[i + 1],
                               words[i + 2], words[i + 3]);
      }
    }
  }

  // Bases become the block's largest scores where these are far above.
  __device__ void move_bases() {
    auto& heads = *reinterpret_cast<typename Config::Heads*>(shared_.p[kOwn]);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float largest = over_tokens(fmaxf(score(i, 0), score(i, 1)), fmaxf);
      if (lane_ < 4) heads.maxima[warp_][head(i)] = largest * scale_log2_;
    }
    sync();
    float factors[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      float largest = -kAttentionInf;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        largest = fmaxf(largest, heads.maxima[warp][head(i)]);
      }
      const bool moves = largest - bases_[i] > kSlack;  // also the first one of all
      factors[i] = moves ? ptx::exp2_approx(bases_[i] - largest) : 1.0f;
      if (moves) bases_[i] = largest;
      sums_[i] *= factors[i];
    }
#pragma unroll
    for (auto& tile : out_) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) tile[i] *= factors[mine(i)];
    }
    sync();  // they are read, and P goes there
  }

  // P with the block's values, two tiles of the output in turn; lets go of them part by part.
  __device__ void multiply_v() {
    constexpr int kStepBytes = 16 * 128;  // of 16 tokens
    const ptx::WgmmaRowsDescriptor v(shared_.kv[kOwn][0], Config::kBlockBytes);
    const ptx::WgmmaDescriptor<128> p(shared_.p[kOwn]);
    constexpr int kFirst = Config::kParts - Config::kValueParts;
    ptx::wgmma_fence();
#pragma unroll
    for (int n = kFirst; n < Config::kParts; ++n) {
      const int block = Config::first_dim_block(Config::part_at(n));
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < Config::kPartBlocks; ++i) {
          ptx::wgmma_few<Element>(out_[block + i],
                                  v + ((block + i) * Config::kBlockBytes + step * kStepBytes),
                                  p + step * 32, true);
        }
      }
      ptx::wgmma_commit();
    }
    static_assert(Config::kValueParts == 4);
    ptx::wgmma_wait<3>();
    let_go(Config::part_at(kFirst));
    ptx::wgmma_wait<2>();
    let_go(Config::part_at(kFirst + 1));
    ptx::wgmma_wait<1>();
    let_go(Config::part_at(kFirst + 2));
    ptx::wgmma_wait<0>();
    for (auto& tile : out_) ptx::wgmma_result(tile);
    let_go(Config::part_at(kFirst + 3));
  }

  SharedStorage& shared_;
  const float& scale_log2_;  // above 0; among the arguments, to leave registers
  const int warp_, lane_;
  std::uint32_t phase_ = 0;  // of this warpgroup's block
  float bases_[kMine], maxima_[kMine];
  float sums_[kMine];  // of 2^(score - base), of this thread's tokens
  float scores_[kSums];
  float out_[kDimTiles][kSums];
};

}  // namespace dsa::cuda::sm90a
