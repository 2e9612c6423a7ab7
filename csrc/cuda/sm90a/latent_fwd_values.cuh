// SPDX-License-Identifier: Apache-2.0
// The output of 64 heads: two warpgroups, each of which multiplies P with half of the values'
// dims.
#pragma once

#include <cstdint>

#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_output.cuh"

namespace dsa::cuda::sm90a {

template <typename Config>
class LatentFwdValues {
 public:
  using SharedStorage = typename Config::SharedStorage;
  using Element = typename Config::Element;

  __device__ LatentFwdValues(SharedStorage& shared, const AttentionArgs& args, int half, int thread)
      : shared_(shared), args_(args), half_(half), warp_(thread / 32 % 4), lane_(thread % 32) {}

  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::Turns turns(grid);
    for (unsigned n = 0; turns.has(n); ++n) {
      ptx::mbarrier_wait(shared_.full_task[n % 2], n / 2 % 2);
#pragma unroll
      for (int i = 0; i < Config::kHalf / 2; ++i) output(i) = 0.0f;
      ring_.next(Config::kHeldParts);  // q's
      for (int left = shared_.tasks[n % 2].blocks; left > 0; --left) {
        ptx::mbarrier_wait(shared_.full_p[p_ring_.index], p_ring_.phase);
        if (shared_.moved[p_ring_.index][warp_]) rescale(shared_.factors[p_ring_.index]);
        if constexpr (!Config::kByRows) {
          const std::int32_t tokens = shared_.tokens[p_ring_.index];
          if (tokens < Config::kTokens) clear(tokens);
        }
        multiply();
        if (left > 1) let_go(shared_.empty_p[p_ring_.index]);
        if (left > 1) p_ring_.next();
      }
      ptx::mbarrier_wait(shared_.full_factor[n % 2], n / 2 % 2);
      finish(shared_.out_factor[n % 2]);
      const AttentionPlace& at = shared_.tasks[n % 2].place;
      if constexpr (Config::kQueries > 1) {
        if (has_nan()) attend_alone(grid.unions, at);
      }
      const auto sum = [&](int i) { return output(i); };
      if (args_.num_splits > 1) {
        stored().store(args_.partial_out + at.partial * Config::kDimV, at.heads, sum);
      } else {
        ptx::named_sync<LatentFwdBarrier::kBoth, Config::kValueThreads>();  // P is no longer read
        stored().store(args_.out + at.b * args_.out_stride_b + at.j * args_.out_stride_j +
                           at.first_head * args_.out_stride_h,
                       args_.out_stride_b, args_.out_stride_h, at.heads, shared_.p[p_ring_.index],
                       sum);
      }
      let_go(shared_.empty_task[n % 2]);
      let_go(shared_.empty_p[p_ring_.index]);
      p_ring_.next();
    }
  }

 private:
  __device__ LatentFwdOutput<Config> stored() const { return {half_, warp_, lane_}; }
  __device__ int row(int i) const { return stored().row(i); }

  __device__ void rescale(const float (&by)[Config::kHeads]) {
    const float factors[2] = {by[row(0)], by[row(1)]};
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) output(i) *= factors[i / 2 % 2];
  }

  // Of this half: rows that P is 0 for, but that may be anything.
  __device__ void clear(int tokens) const {
    LatentFwdRing<Config::kPlaces> ring = ring_;
    ring.next(half_ * Config::kHalfParts);
    for (int part = 0; part < Config::kHalfParts; ++part, ring.next()) {
      for (int i = 32 * warp_ + lane_; i < Config::kPartBlocks * Config::kBlockBytes / 16;
           i += 128) {
        if (i / 8 % Config::kTokens >= tokens) {
          reinterpret_cast<uint4*>(shared_.kv[ring.index])[i] = uint4{};
        }
      }
    }
    ptx::fence_async_shared();
    if (half_ == 0) {
      ptx::named_sync<LatentFwdBarrier::kFirstHalf, 128>();
    } else {
      ptx::named_sync<LatentFwdBarrier::kSecondHalf, 128>();
    }
  }

  // P with a block's values.
  __device__ void multiply() {
    const ptx::WgmmaRowsDescriptor values(shared_.kv[0], Config::kBlockBytes);
    const ptx::WgmmaDescriptor<128> p =
        ptx::WgmmaDescriptor<128>(shared_.p[0]) + p_ring_.index * Config::kBlockBytes;
    // After the first half's first part: its place is the first that is needed again, and is free
    // after a quarter of the time, not half.
    if (half_ == 1) ptx::mbarrier_wait(shared_.empty[ring_.index], ring_.phase);
    ring_.next(half_ * Config::kHalfParts);
    std::uint32_t places[Config::kHalfParts];
    ptx::wgmma_fence();
#pragma unroll
    for (int part = 0; part < Config::kHalfParts; ++part, ring_.next()) {
      places[part] = ring_.index;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_rows<Element>(
            out_[part], p + step * 32,
            values + (ring_.index * (Config::kPartBlocks * Config::kBlockBytes) + step * 16 * 128));
      }
      ptx::wgmma_commit();
    }
    ring_.next((1 - half_) * Config::kHalfParts);
    ptx::wgmma_wait<1>();
    let_go(shared_.empty[places[0]]);
    ptx::wgmma_wait<0>();
    for (auto& part : out_) ptx::wgmma_result(part);
    let_go(shared_.empty[places[1]]);
  }
  __device__ void let_go(ptx::Mbarrier& empty) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(empty);
  }

  __device__ void finish(const float (&by)[Config::kHeads]) {
    const float factors[2] = {by[row(0)], by[row(1)]};
    if (factors[0] < 0.0f || factors[1] < 0.0f) {  // whatever was summed
#pragma unroll
      for (int i = 0; i < Config::kHalf / 2; ++i) {
        if (factors[i / 2 % 2] < 0.0f) output(i) = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) output(i) *= factors[i / 2 % 2];
  }

  // Of this warp's heads, whose token may not have the row that it is of: P is 0, the product not.
  __device__ bool has_nan() {
    bool is_number = true;
#pragma unroll
    for (int i = 0; i < Config::kHalf / 2; ++i) is_number = is_number && output(i) == output(i);
    return !__all_sync(~0u, is_number);
  }
  __device__ void attend_alone(const RowUnions& unions, const AttentionPlace& at) const {
    const auto first = static_cast<int>(at.b - args_.first_row);
    if (lane_ != 0 || atomicExch(&unions.sizes[first / Config::kQueries], -1) < 0) return;
    unions.add_tokens(first, Config::kQueries);
  }

  // As LatentFwdOutput has them.
  __device__ float& output(int i) { return out_[i / kPartSums][i % kPartSums]; }
  static constexpr int kPartSums = Config::kPartDims / 2;

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const int half_, warp_, lane_;
  LatentFwdRing<Config::kPlaces> ring_;
  LatentFwdRing<2> p_ring_;
  float out_[Config::kHalfParts][kPartSums];
};

}  // namespace dsa::cuda::sm90a
