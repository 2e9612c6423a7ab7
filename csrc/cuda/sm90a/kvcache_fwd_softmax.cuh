// SPDX-License-Identifier: Apache-2.0
// The decode kernel's softmax: scores in shared memory -> P^T there, by the output's warpgroups,
// which wait for products half of the time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdSoftmax {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // factor: what makes products scores in base 2. half: which of the warpgroups; it has half of the
  // heads.
  __device__ KvCacheFwdSoftmax(SharedStorage& shared, float factor, int half, int warp, int lane)
      : shared_(shared), factor_(factor), half_(half), warp_(warp), lane_(lane) {}

  // P of a tile, whose rows are in `stage`; P before it is no longer read. Whether what was summed
  // with it has to be multiplied by shared.factors. P is there after a barrier of the warpgroups.
  __device__ bool make_p(int stage, bool is_last) {
    // Scores become those of base 2, plus the row's exponent, which P then has and V has not, less
    // the head's base; -inf where there is no row.
    float x[4 * kBlocks] = {};  // of eight heads each: two rows of two heads
    float up[2];                // what P lacks of the softmax's summand
    if (active()) {
      float scales[2], plus[2];
      bool has[2];
      float largest[2 * kBlocks];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 16 * warp_ + lane_ / 4 + 8 * i;
        const std::int32_t exponent = shared_.exponents[stage][row];
        has[i] = exponent != Config::kNoRow;
        up[i] = __uint_as_float((127 - (has[i] ? exponent : 0)) << 23);
        plus[i] = static_cast<float>(exponent);
        scales[i] = factor_;
        if constexpr (!Config::kIsV32) scales[i] *= shared_.scales[stage].of_scores[row];
      }
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float4 scores = shared_.scores[block(j)][32 * warp_ + lane_];
        const float2 base = *reinterpret_cast<const float2*>(&shared_.bases[head(j)]);
        x[4 * j] = fmaf(scores.x, scales[0], plus[0] - base.x);
        x[4 * j + 1] = fmaf(scores.y, scales[0], plus[0] - base.y);
        x[4 * j + 2] = fmaf(scores.z, scales[1], plus[1] - base.x);
        x[4 * j + 3] = fmaf(scores.w, scales[1], plus[1] - base.y);
        if constexpr (Config::kHasMaxima) {
          largest[2 * j] = largest_of(has, scores.x * scales[0], scores.z * scales[1]);
          largest[2 * j + 1] = largest_of(has, scores.y * scales[0], scores.w * scales[1]);
        }
      }
      if constexpr (Config::kHasMaxima) note_maxima(largest);
      if (!__all_sync(~0u, has[0] && has[1])) {
#pragma unroll
        for (int i = 0; i < 4 * kBlocks; ++i) {
          if (!has[i / 2 % 2]) x[i] = -kAttentionInf;
        }
      }
    }
    const bool moves =
        ptx::named_any<kValueBarrier, Config::kValueThreads>(active() && is_above(x));
    if (!is_last) ptx::named_arrive<kEmptyScores, Config::kMathThreads>();
    if (moves) move_bases(x);
    if (active()) store_p(x, up);
    return moves;
  }

  // use(head, result), a thread a head. P is no longer read.
  template <typename Use>
  __device__ void finish(Use&& use) {
    const float* rows = by_row(sums_);
    const int head = 128 * half_ + 32 * warp_ + lane_;
    const bool has_head = head < Config::kHeads;
    float sum = 0.0f;
    for (int i = 0; i < kRows && has_head; ++i) sum += rows[i * Config::kHeads + head];
    const float base = has_head ? shared_.bases[head] : 0.0f;
    float largest = sum == 0.0f ? -kAttentionInf : base;
    if constexpr (Config::kHasMaxima) {
      ptx::named_sync<kValueBarrier, Config::kValueThreads>();
      publish_maxima();
      largest = -kAttentionInf;
      for (int warp = 0; warp < 4 && has_head; ++warp) {
        largest = fmaxf(largest, rows[warp * Config::kHeads + head]);
      }
    }
    if (has_head) use(head, HeadResult(sum, base, largest));
  }

 private:
  static constexpr int kBlocks = std::max(Config::kHeads / 16, 1);  // of 8 heads, of a thread
  static constexpr int kRows = 32;  // of a head's scores, as threads have them
  // Scores may be above their base by this much, in powers of two.
  static constexpr float kSlack = 8.0f;

  // Eight heads are for one of the warpgroups.
  __device__ bool active() const { return Config::kHeads >= 16 || half_ == 0; }
  __device__ int block(int j) const { return kBlocks * half_ + j; }
  __device__ int head(int j) const { return 8 * block(j) + lane_ % 4 * 2; }  // and the next

  __device__ static float largest_of(const bool (&has)[2], float x, float y) {
    return fmaxf(has[0] ? x : -kAttentionInf, has[1] ? y : -kAttentionInf);
  }

  // Of this thread's heads. Lanes that have the same ones share them out: registers are short.
  __device__ void note_maxima(float (&largest)[2 * kBlocks]) {
    int lanes = 4;
#pragma unroll
    for (int left = kBlocks; left > 0; left /= 2, lanes *= 2) {
      const bool has_upper = (lane_ & lanes) != 0;
#pragma unroll
      for (int i = 0; i < left; ++i) {
        const float given = has_upper ? largest[i] : largest[i + left];
        const float kept = has_upper ? largest[i + left] : largest[i];
        largest[i] = fmaxf(kept, __shfl_xor_sync(~0u, given, lanes));
      }
    }
    maximum_ = fmaxf(maximum_, largest[0]);
  }

  // Of each warp and head, where P was.
  __device__ void publish_maxima() {
    int own = 0, lanes = 4;  // which of the heads that note_maxima shares out
#pragma unroll
    for (int left = kBlocks; left > 0; left /= 2, lanes *= 2) {
      if ((lane_ & lanes) != 0) own += left;
    }
#pragma unroll
    for (; lanes < 32; lanes *= 2) {
      maximum_ = fmaxf(maximum_, __shfl_xor_sync(~0u, maximum_, lanes));
    }
    auto* rows = reinterpret_cast<float*>(shared_.p[0]);
    if (active()) rows[warp_ * Config::kHeads + head(own / 2) + own % 2] = maximum_;
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
  }

  __device__ bool is_above(const float (&x)[4 * kBlocks]) const {
    float largest[2] = {-kAttentionInf, -kAttentionInf};
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) largest[i % 2] = fmaxf(largest[i % 2], x[i]);
    return fmaxf(largest[0], largest[1]) > (has_bases_ ? kSlack : -kAttentionInf);
  }

  // Of all threads what they have of each head: kRows rows of heads, where P will be.
  __device__ const float* by_row(const float (&x)[2 * kBlocks]) const {
    auto* rows = reinterpret_cast<float*>(shared_.p[0]);
    static_assert(kRows * Config::kHeads * sizeof(float) <= sizeof(shared_.p[0]));
    if (active()) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        float* row = &rows[(8 * warp_ + lane_ / 4) * Config::kHeads];
        *reinterpret_cast<float2*>(&row[head(j)]) = {x[2 * j], x[2 * j + 1]};
      }
    }
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
    return rows;
  }

  // Bases become the largest scores so far, and stay 0 where there are none; what was summed with
  // the old ones is to be multiplied by the factors.
  __device__ void move_bases(float (&x)[4 * kBlocks]) {
    float largest[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      largest[i] = fmaxf(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]);
    }
    const float* rows = by_row(largest);
    const int h = 128 * half_ + 32 * warp_ + lane_;
    bool lacks = false;
    if (h < Config::kHeads) {
      std::uint8_t& has_base = shared_.has_base[h];
      float up = has_base != 0 ? 0.0f : -kAttentionInf;
      for (int i = 0; i < kRows; ++i) up = fmaxf(up, rows[i * Config::kHeads + h]);
      const bool has_any = up != -kAttentionInf;  // score so far
      if (!has_any) up = 0.0f;
      shared_.bases[h] += up;
      shared_.ups[h] = up;
      shared_.factors[h] = has_base != 0 ? ptx::exp2_approx(-up) : 1.0f;
      has_base = has_any ? 1 : 0;
      lacks = !has_any;
    }
    has_bases_ = !ptx::named_any<kValueBarrier, Config::kValueThreads>(lacks);
    if (!active()) return;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float2 up = *reinterpret_cast<const float2*>(&shared_.ups[head(j)]);
      const float2 factor = *reinterpret_cast<const float2*>(&shared_.factors[head(j)]);
      x[4 * j] -= up.x;
      x[4 * j + 1] -= up.y;
      x[4 * j + 2] -= up.x;
      x[4 * j + 3] -= up.y;
      sums_[2 * j] *= factor.x;
      sums_[2 * j + 1] *= factor.y;
    }
  }

  // P^T as f16, and of V4 without the exponents as bf16.
  __device__ void store_p(const float (&x)[4 * kBlocks], const float (&up)[2]) {
    std::uint32_t words[2 * kBlocks], rope_words[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const float p0 = ptx::exp2_approx(x[2 * i]), p1 = ptx::exp2_approx(x[2 * i + 1]);
      sums_[i / 2 * 2] = fmaf(p0, up[i % 2], sums_[i / 2 * 2]);
      sums_[i / 2 * 2 + 1] = fmaf(p1, up[i % 2], sums_[i / 2 * 2 + 1]);
      words[i] = pack<__half>(p0, p1);
      if constexpr (!Config::kIsV32) {
        rope_words[i] = pack<__nv_bfloat16>(p0 * up[i % 2], p1 * up[i % 2]);
      }
    }
    store_words(words, shared_.p[0]);
    if constexpr (!Config::kIsV32) store_words(rope_words, shared_.p[1]);
    ptx::fence_async_shared();  // for wgmma
  }

  // By token, transposed: rows of heads.
  __device__ void store_words(const std::uint32_t (&words)[2 * kBlocks], void* p) const {
    // Lane l has the address of row l % 8 of matrix l / 8: 8 heads by 8 tokens.
    const std::uint32_t chunk = 2 * warp_ + lane_ / 8 % 2;
    const std::uint32_t address =
        ptx::shared_address(p) + 8 * block(0) * 128 + lane_ % 8 * 128 + (chunk ^ lane_ % 8) * 16;
    if constexpr (kBlocks == 1) {
      ptx::stmatrix_x2_trans(address, words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; i += 4) {
        ptx::stmatrix_x4_trans(address + (i / 2 + lane_ / 16) * 8 * 128, words[i], words[i + 1],
                               words[i + 2], words[i + 3]);
      }
    }
  }

  SharedStorage& shared_;
  const float factor_;
  const int half_, warp_, lane_;
  bool has_bases_ = false;          // of all heads: a score so far
  float sums_[2 * kBlocks] = {};    // of 2^(score - base), over this thread's rows
  float maximum_ = -kAttentionInf;  // with kHasMaxima: of the scores of a head
};

}  // namespace dsa::cuda::sm90a
