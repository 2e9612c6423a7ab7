// SPDX-License-Identifier: Apache-2.0
// The decode kernel's splits, combined by the cluster of CTAs that has them. Each has put what it
// summed, and what that means, in its shared memory, and combines parts of it, half of a head's
// dims, from all of them, a warp each. What is in another CTA takes some 700 cycles, so loads are
// together; and code that runs once is small, since it comes from memory.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/arithmetic.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"
#include "cuda/sm90a/kvcache_fwd_values.cuh"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdCombination {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // By the output's threads, from 0.
  __device__ KvCacheFwdCombination(SharedStorage& shared, const AttentionArgs& args, int thread)
      : shared_(shared),
        args_(args),
        at_(AttentionPlace::of_cta(args, Config::kHeads)),
        ctas_(args.num_splits),
        width_(static_cast<int>(std::bit_ceil(static_cast<unsigned>(args.num_splits)))),
        rank_(static_cast<int>(ptx::cluster_rank())),
        thread_(thread) {}

  // After this CTA's output and results are staged. No CTA leaves before all have read them.
  __device__ void run() const {
    ptx::cluster_sync();
    weigh();
    ptx::named_sync<kValueBarrier, Config::kValueThreads>();
    for (int own = thread_ / 32; has(own); own += kWarps) combine(own);
    ptx::cluster_arrive_relaxed();  // nothing was written for others, and what was read is used
    ptx::cluster_wait();
  }

 private:
  static constexpr int kWarps = Config::kValueThreads / 32;
  static constexpr int kPartsOfHead = 2;
  static constexpr int kDims = Config::kDimV / kPartsOfHead;  // of a part: eight of a lane
  static constexpr int kSplits = 4;                           // that are asked for together

  // The own-th part of this CTA, if there is one.
  __device__ int part(int own) const { return rank_ + own * ctas_; }
  __device__ bool has(int own) const { return part(own) < at_.heads * kPartsOfHead; }
  __device__ int head(int own) const { return part(own) / kPartsOfHead; }
  __device__ int dim(int own) const { return part(own) % kPartsOfHead * kDims + thread_ % 32 * 4; }

  __device__ float* weights(int own) const { return shared_.splits().weights + own * width_; }

  // What each split of a part is multiplied by, below 0 if it is empty: a lane for each.
  __device__ void weigh() const {
    static_assert(2 * Config::kHeads * kPartsOfHead <= Config::kValueThreads);
    const int split = thread_ & (width_ - 1), own = thread_ >> (std::bit_width(width_ - 1u));
    const bool is_split = split < ctas_ && has(own);
    SplitResult result{-kAttentionInf, 0.0f};
    if (is_split) result = ptx::of_cta(shared_.splits().results[head(own)], split);
    float largest = result.lse2;
    for (int lanes = 1; lanes < width_; lanes *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    }
    const bool empty = result.lse2 == -kAttentionInf;
    const float weight = empty ? 0.0f : ptx::exp2_approx(result.lse2 - largest);
    float sum = weight;
    for (int lanes = 1; lanes < width_; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (!is_split) return;
    const HeadResult all(sum, largest, largest);
    const float factor = beside_sink(args_, at_, head(own), all, all.factor());
    weights(own)[split] = empty ? kZeroOutput : weight * result.factor * factor;
    if (split == 0 && part(own) % kPartsOfHead == 0) store_statistics(args_, at_, head(own), all);
  }

  __device__ void combine(int own) const {
    const float4* from = KvCacheFwdValues<Config>::staged(shared_, head(own), dim(own));
    float4 sums[2] = {};
#pragma unroll 1
    for (int first = 0; first < ctas_; first += kSplits) {
      float4 x[kSplits][2] = {};
      float factors[kSplits];
#pragma unroll
      for (int i = 0; i < kSplits; ++i) {
        factors[i] = first + i < ctas_ ? weights(own)[first + i] : kZeroOutput;
        if (factors[i] < 0.0f) continue;  // whatever was summed
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[i][half] = ptx::of_cta(from[32 * half], first + i);
        }
      }
#pragma unroll
      for (int i = 0; i < kSplits; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) add(x[i][half], factors[i], sums[half]);
      }
    }
    store(own, sums);
  }

  __device__ static void add(const float4& x, float factor, float4& sum) {
    sum = {fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z),
           fmaf(factor, x.w, sum.w)};
  }

  // It is aligned: else there are no clusters.
  __device__ void store(int own, const float4 (&sums)[2]) const {
    std::uint16_t* out = args_.out + at_.b * args_.out_stride_b + at_.j * args_.out_stride_j +
                         (at_.first_head + head(own)) * args_.out_stride_h + dim(own);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4& x = sums[half];
      *reinterpret_cast<uint2*>(out + 128 * half) = {pack<__nv_bfloat16>(x.x, x.y),
                                                     pack<__nv_bfloat16>(x.z, x.w)};
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const AttentionPlace at_;
  const int ctas_, width_, rank_, thread_;
};

}  // namespace dsa::cuda::sm90a
