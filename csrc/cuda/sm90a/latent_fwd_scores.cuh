// SPDX-License-Identifier: Apache-2.0
// The scores of 64 heads: one warpgroup, which keeps the queries in registers, multiplies them
// with block after block and makes P of the scores.
#pragma once

#include <cstdint>

#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_softmax.cuh"

namespace dsa::cuda::sm90a {

template <typename Config>
class LatentFwdScores {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  __device__ LatentFwdScores(SharedStorage& shared, const AttentionArgs& args, int thread)
      : shared_(shared), args_(args), warp_(thread / 32 % 4), lane_(thread % 32) {}

  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::Turns turns(grid);
    for (unsigned n = 0; turns.has(n); ++n) {
      ptx::mbarrier_wait(shared_.full_task[n % 2], n / 2 % 2);
      int left = shared_.tasks[n % 2].blocks;
      load_q(n);
      begin();
      for (bool is_first = true; left > 0; --left, is_first = false) {
        issue_qk();
        finish_qk(is_first);
        if (left == 1) let_go(shared_.empty_q);
        softmax(is_first);
      }
      ptx::fence_async_shared();
      let_p_be_used();
      finish(shared_.tasks[n % 2].place, n);
      let_go(shared_.full_factor[n % 2]);
    }
  }

 private:
  __device__ int row(int i) const { return 16 * warp_ + lane_ / 4 + 8 * i; }
  __device__ static int query(int row) { return row / Config::kHeadsOfQuery; }

  __device__ void let_go(ptx::Mbarrier& empty) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(empty);
  }

  // Of this lane, for ldmatrix: 16 rows of the warp, columns 8 j to 8 j + 15, of 128-byte rows.
  __device__ std::uint32_t matrix_address(const std::uint8_t* block, int j) const {
    const int r = 16 * warp_ + lane_ % 16, chunk = j + lane_ / 16;
    return ptx::shared_address(block) + r * 128 + (chunk ^ r % 8) * 16;
  }

  __device__ void load_q(unsigned n) {
#pragma unroll
    for (int part = 0; part < Config::kHeldParts; ++part, ring_.next()) {
      ptx::mbarrier_wait(shared_.full[ring_.index], ring_.phase);
#pragma unroll
      for (int i = 0; i < 4 * Config::kPartBlocks; ++i) {
        ptx::ldmatrix_x4(q_[4 * Config::kPartBlocks * part + i],
                         matrix_address(shared_.kv[ring_.index][i / 4], i % 4 * 2));
      }
      let_go(shared_.empty[ring_.index]);
    }
    ptx::mbarrier_wait(shared_.full_q, n % 2);
    if constexpr (Config::kByRows) ptx::fence_async_shared();
  }

  __device__ void begin() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bases_[i] = maxima_[i] = -kAttentionInf;
      sums_[i] = 0.0f;
    }
  }

  // The next block's; a group a part, and RoPE before the last one, which comes last. What cp.async
  // has written is in shared memory before it arrives: no fence, which would keep products on their
  // way from following each other.
  __device__ void issue_qk() {
    const ptx::WgmmaDescriptor<128> q(shared_.q[0]), k(shared_.kv[0][0]);
#pragma unroll
    for (int part = 0; part < Config::kParts; ++part, ring_.next()) {
      if (Config::kRope > 0 && part == Config::kParts - 1) {
        const ptx::WgmmaDescriptor<128> rope =
            ptx::WgmmaDescriptor<128>(shared_.rope[0]) + rope_ring_.index * Config::kBlockBytes;
        ptx::mbarrier_wait(shared_.full_rope[rope_ring_.index], rope_ring_.phase);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ptx::wgmma_16_bit<Element>(scores_,
                                     q + (Config::kRopeBlock * Config::kBlockBytes + step * 32),
                                     rope + step * 32, true);
        }
        ptx::wgmma_commit();
      }
      ptx::mbarrier_wait(shared_.full[ring_.index], ring_.phase);
      if (part == 0) {
        if constexpr (Config::kByRows) {
          first_place_ = ring_.index;
          const uint2 valid = valid_tokens();
          lacks_ = (valid.x & valid.y) != ~0u;
        } else {
          tokens_ = shared_.tokens_of[ring_.index].count;
          lacks_ = tokens_ < Config::kTokens;
        }
      }
      ptx::wgmma_fence();
      const ptx::WgmmaDescriptor<128> keys =
          k + ring_.index * (Config::kPartBlocks * Config::kBlockBytes);
#pragma unroll
      for (int i = 0; i < 4 * Config::kPartBlocks; ++i) {
        const int dims = part * Config::kPartBlocks + i / 4, step = i % 4;
        const ptx::WgmmaDescriptor<128> b = keys + (i / 4 * Config::kBlockBytes + step * 32);
        if (dims < Config::kHeldBlocks) {
          ptx::wgmma_16_bit<Element>(scores_, q_[4 * dims + step], b, dims + step > 0);
        } else {
          ptx::wgmma_16_bit<Element>(
              scores_, q + ((dims - Config::kHeldBlocks) * Config::kBlockBytes + step * 32), b,
              true);
        }
      }
      ptx::wgmma_commit();
      if (part == 0) ptx::fence_async_shared();  // for P, which has been stored before
    }
  }

  // When they are nearly done the output's products of the block before may begin.
  __device__ void finish_qk(bool is_first) {
    const LatentFwdRing<2> p = next_p(is_first);
    ptx::mbarrier_wait(shared_.empty_p[p.index], p.phase ^ 1);
    ptx::wgmma_wait<1>();
    if (!is_first) let_p_be_used();
    ptx::wgmma_wait<0>();
    ptx::wgmma_result(scores_);
    if constexpr (Config::kRope > 0) {
      let_go(shared_.empty_rope[rope_ring_.index]);
      rope_ring_.next();
    }
  }

  // By rows, of this warp's query token and the block whose scores these are.
  __device__ uint2 valid_tokens() const {
    const auto& valid = shared_.tokens_of[first_place_].valid[query(16 * warp_)];
    return *reinterpret_cast<const uint2*>(valid);
  }

  // Scores of what is no token.
  __device__ void mask() {
    if constexpr (Config::kByRows) {
      // Token 8 c + 2 (lane % 4) + e is bit 4 (c / 2) + e of word c % 2.
      const uint2 valid = valid_tokens();
      const int first = lane_ % 4 / 2 * 16 + lane_ % 2 * 2;
      const std::uint32_t words[2] = {valid.x >> first, valid.y >> first};
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const bool is_there = (words[i / 4 % 2] >> (i / 8 * 4 + i % 2) & 1) != 0;
        if (!is_there) scores_[i] = -kAttentionInf;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int token = i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (token >= tokens_) scores_[i] = -kAttentionInf;
      }
    }
  }

  // Scores -> P, of the bases that there are; where sums turn out to be far above them, or not to
  // be numbers, bases move and P is made again.
  __device__ void softmax(bool is_first) {
    if (lacks_) mask();
    if constexpr (Config::kByRows) {
      float largest[2];
      thread_maxima(scores_, largest);
#pragma unroll
      for (int i = 0; i < 2; ++i) maxima_[i] = fmaxf(maxima_[i], largest[i]);
    }
    float sums[2];
    bool is_above[2] = {true, true};
    if (!is_first) {
      store_p(bases_, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) is_above[i] = !(sums[i] <= kLatentMost);
    }
    const bool moved = __any_sync(~0u, is_above[0] || is_above[1]);
    if (moved) {
      float shift[2];
      move_bases(is_above, shift);
      store_p(shift, sums);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sums_[i] += sums[i];
    if (lane_ == 0) {
      shared_.moved[p_ring_.index][warp_] = moved;
      if constexpr (!Config::kByRows) shared_.tokens[p_ring_.index] = tokens_;
    }
  }

  // P, and its sums before it is rounded.
  __device__ void store_p(const float (&shift)[2], float (&sums)[2]) const {
    const float& scale = args_.scale_log2;
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      std::uint32_t p[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* scores = scores_ + 8 * step + 2 * k;
        const float p0 = ptx::exp2_approx(fmaf(scores[0], scale, -shift[k % 2]));
        const float p1 = ptx::exp2_approx(fmaf(scores[1], scale, -shift[k % 2]));
        sums[k % 2] += p0 + p1;
        p[k] = pack<Element>(p0, p1);
      }
      ptx::stmatrix_x4(matrix_address(shared_.p[p_ring_.index], 2 * step), p);
    }
  }

  // Of rows that are far above theirs, to their largest scores. shift: the bases, 0 where there is
  // no score yet. A row's bits do not depend on the others.
  __device__ void move_bases(const bool (&is_above)[2], float (&shift)[2]) {
    float largest[2];
    thread_maxima(scores_, largest);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float of_row = fmaxf(bases_[i], quad_max(largest[i]) * args_.scale_log2);
      const unsigned quad = 0xFu << lane_ / 4 * 4;
      const bool moves = (__ballot_sync(~0u, is_above[i]) & quad) != 0 && of_row > bases_[i];
      const float factor = moves ? ptx::exp2_approx(bases_[i] - of_row) : 1.0f;
      if (moves) bases_[i] = of_row;
      sums_[i] *= factor;
      if (lane_ % 4 == 0) shared_.factors[p_ring_.index][row(i)] = factor;
      shift[i] = bases_[i] == -kAttentionInf ? 0.0f : bases_[i];
    }
  }

  // Where P of the block whose products are on their way goes.
  __device__ LatentFwdRing<2> next_p(bool is_first) const {
    LatentFwdRing<2> ring = p_ring_;
    if (!is_first) ring.next();
    return ring;
  }

  __device__ void let_p_be_used() {
    let_go(shared_.full_p[p_ring_.index]);
    p_ring_.next();
  }

  __device__ void finish(const AttentionPlace& at, unsigned n) {
    float sums[2], maxima[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] = quad_sum(sums_[i]);
      maxima[i] = Config::kByRows ? quad_max(maxima_[i]) * args_.scale_log2 : -kAttentionInf;
    }
    if (lane_ % 4 < 2) {
      const bool second = lane_ % 2 != 0;
      const auto mine = [&](const float (&x)[2]) { return second ? x[1] : x[0]; };
      const int r = row(second ? 1 : 0), head = r % Config::kHeadsOfQuery;
      const HeadResult result(mine(sums), mine(bases_), mine(maxima));
      shared_.out_factor[n % 2][r] =
          head < at.heads ? store_head(args_, at.after(query(r)), head, result) : 0.0f;
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const int warp_, lane_;
  LatentFwdRing<Config::kPlaces> ring_;
  LatentFwdRing<Config::kRopePlaces> rope_ring_;
  LatentFwdRing<2> p_ring_;
  // Of the block whose scores these are:
  bool lacks_;                 // tokens
  std::int32_t tokens_;        // of a page
  std::uint32_t first_place_;  // by rows, of its first part
  float bases_[2], maxima_[2];
  float sums_[2];  // of 2^(score - base), of this thread's scores
  float scores_[32];
  std::uint32_t q_[4 * Config::kHeldBlocks][4];
};

}  // namespace dsa::cuda::sm90a
