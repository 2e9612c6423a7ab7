// SPDX-License-Identifier: Apache-2.0
// Which digit the key of a wanted rank has: a histogram of a CTA's keys in shared memory, or one
// for each CTA of a cluster. All threads call each function, with equal arguments but for add().
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/topk/cta_sum.cuh"

namespace dsa::cuda::topk {

inline constexpr int kMostCtas = 16;  // of a cluster

// The bin that holds the key of the rank, from 1, largest first.
struct FoundBin {
  std::uint32_t digit;
  std::uint32_t count;   // keys in the bin
  std::uint32_t wanted;  // of them, to reach the rank
};

// Keys from at_least on are taken, and the first num_ties, in column order, of those one below.
struct Threshold {
  std::uint32_t at_least = 0;
  std::uint32_t num_ties = 0;

  __device__ bool takes(std::uint32_t key) const { return key >= at_least; }
  __device__ bool ties(std::uint32_t key) const { return key + 1 == at_least; }
};

// A thread counts in any bin, and sums up some of its own; those of lower threads hold larger
// digits.
template <int kThreads>
struct Bins {
  static constexpr int kDigitBits = std::min(31 - __builtin_clz(8 * kThreads), 11);
  static constexpr int kNumBins = 1 << kDigitBits;
  static constexpr int kPerThread = kNumBins / kThreads;

  struct alignas(std::min(4 * kPerThread, 16)) Own {
    std::uint32_t counts[kPerThread];

    __device__ std::uint32_t sum() const {
      std::uint32_t sum = 0;
#pragma unroll
      for (const std::uint32_t count : counts) sum += count;
      return sum;
    }
  };

  alignas(16) std::uint32_t counts[kNumBins + 1];

  static __device__ int first_own() { return kNumBins - kPerThread * (threadIdx.x + 1); }
  __device__ Own& own() { return *reinterpret_cast<Own*>(&counts[first_own()]); }

  // An atomicAdd of 1 without a result counts the lanes that share an address in one step, but
  // only without a condition: digits past the last are counted too, in one bin that nobody reads.
  __device__ void add(std::uint32_t digit) {
    atomicAdd(&counts[std::min<std::uint32_t>(digit, kNumBins)], 1u);
  }
};

// Of one CTA. All bins are 0 before the first add(), and again after each find().
template <int kThreads>
struct CtaHistogram {
  using Bins = topk::Bins<kThreads>;
  static constexpr int kDigitBits = Bins::kDigitBits;

  Bins bins;
  WarpTotals<kThreads> warp_totals;
  FoundBin found;

  // Before a barrier.
  __device__ void clear() { bins.own() = {}; }
  __device__ void wait_for_all() {}
  __device__ Bins& of_digit(int) { return bins; }

  // Begins and ends with a barrier.
  __device__ FoundBin find(int, std::uint32_t wanted, std::uint32_t& turn) {
    __syncthreads();
    const typename Bins::Own own = bins.own();
    bins.own() = {};
    std::uint32_t before[Bins::kPerThread + 1];  // each of them, larger digits first
    before[0] = 0;
#pragma unroll
    for (int b = 0; b < Bins::kPerThread; ++b) {
      before[b + 1] = before[b] + own.counts[Bins::kPerThread - 1 - b];
    }
    const std::uint32_t sum = before[Bins::kPerThread];
    const std::uint32_t inclusive = warp_inclusive_sum(sum);
    const std::uint32_t larger =
        sum_over_warps<kThreads>(warp_totals, turn, inclusive).before + inclusive - sum;
    if (wanted - larger - 1 < sum) {  // one thread
      wanted -= larger;
      FoundBin bin{0, before[1], wanted};
#pragma unroll
      for (int b = 1; b < Bins::kPerThread; ++b) {
        if (wanted > before[b]) {
          bin = {static_cast<std::uint32_t>(b), before[b + 1] - before[b], wanted - before[b]};
        }
      }
      bin.digit = Bins::first_own() + Bins::kPerThread - 1 - bin.digit;
      found = bin;
    }
    __syncthreads();
    return found;
  }
};

// Of all CTAs of a cluster, each of which has bins for each of kDigits digits. They send each other
// what their groups of bins have, and then the bins of one group.
template <int kThreads, int kDigits>
struct ClusterHistogram {
  using Bins = topk::Bins<kThreads>;
  static constexpr int kDigitBits = Bins::kDigitBits;
  static constexpr int kGroup = kWarpSize;  // bins of a group
  static constexpr int kNumGroups = Bins::kNumBins / kGroup;
  static constexpr int kLanes = kGroup / Bins::kPerThread;  // that have a group's bins
  static_assert(kNumGroups == 2 * kWarpSize && kGroup % Bins::kPerThread == 0);
  static_assert(kThreads >= kMostCtas * kNumGroups / 4);

  Bins bins[kDigits];
  alignas(16) std::uint32_t own_groups[kNumGroups];
  // Of each CTA.
  alignas(16) std::uint32_t groups[kDigits][kMostCtas][kNumGroups];
  alignas(16) std::uint32_t bins_of_group[kDigits][kMostCtas][kGroup];
  std::uint32_t told[kMostCtas];
  ptx::Mailbox groups_box[kDigits], bins_box[kDigits], told_box;
  WarpTotals<kThreads> warp_totals;
  FoundBin found;

  // Before a barrier.
  __device__ void clear() {
    for (Bins& of_digit : bins) of_digit.own() = {};
    if (threadIdx.x == 0) {
      const std::uint32_t size = ptx::cluster_size();
      for (ptx::Mailbox& box : groups_box) box.open(size * sizeof(groups[0][0]));
      for (ptx::Mailbox& box : bins_box) box.open(size * sizeof(bins_of_group[0][0]));
      told_box.open(size * sizeof(told[0]));
      ptx::fence_mailboxes();
    }
    ptx::cluster_arrive_relaxed();
  }
  // By all, before the first find() or for want of one.
  __device__ void wait_for_all() { ptx::cluster_wait(); }

  __device__ Bins& of_digit(int d) { return bins[d]; }

  // Begins and ends with a barrier.
  __device__ FoundBin find(int d, std::uint32_t wanted, std::uint32_t&) {
    __syncthreads();
    std::uint32_t sum = bins[d].own().sum();
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (threadIdx.x % kLanes == 0) own_groups[Bins::first_own() / kGroup] = sum;
    __syncthreads();
    const std::uint32_t own = ptx::cluster_rank(), size = ptx::cluster_size();
    const std::uint32_t four = threadIdx.x % (kNumGroups / 4) * 4;
    const std::uint32_t rank = threadIdx.x / (kNumGroups / 4);
    if (rank < size) {
      groups_box[d].send(groups[d][own][four], reinterpret_cast<uint4&>(own_groups[four]), rank);
    }
    if (threadIdx.x < kWarpSize) find_of_all(d, wanted, own, size);
    __syncthreads();
    return found;
  }

  // Tells all CTAs `value`; returns what the CTA of this lane's rank told, if it is below this one.
  // After it no CTA sends anything to this one any more.
  __device__ std::uint32_t tell(std::uint32_t value) {
    const std::uint32_t own = ptx::cluster_rank();
    if (threadIdx.x < ptx::cluster_size()) told_box.send(told[own], value, threadIdx.x);
    told_box.wait();
    const std::uint32_t lane = threadIdx.x % kWarpSize;
    return lane < own ? told[lane] : 0;
  }

 private:
  // By a warp, whose lower lanes have larger digits. First the group of bins, then the bin.
  __device__ void find_of_all(int d, std::uint32_t wanted, std::uint32_t own, std::uint32_t size) {
    const int lane = threadIdx.x;
    const int pair = kNumGroups - 2 * (lane + 1);
    uint2 counts = {0, 0};
    groups_box[d].wait();
#pragma unroll 4
    for (std::uint32_t rank = 0; rank < size; ++rank) {
      const auto of_cta = reinterpret_cast<const uint2&>(groups[d][rank][pair]);
      counts.x += of_cta.x;
      counts.y += of_cta.y;
    }
    const std::uint32_t both = counts.x + counts.y;
    std::uint32_t larger = warp_inclusive_sum(both) - both;
    const std::uint32_t here = __ballot_sync(kAllLanes, wanted - larger - 1 < both);
    int group = pair + 1;
    if (wanted > larger + counts.y) {
      larger += counts.y;
      group = pair;
    }
    wanted -= __shfl_sync(kAllLanes, larger, __ffs(here) - 1);
    group = __shfl_sync(kAllLanes, group, __ffs(here) - 1);

    for (std::uint32_t i = lane; i < size * (kGroup / 4); i += kWarpSize) {
      const std::uint32_t four = i % (kGroup / 4) * 4, rank = i / (kGroup / 4);
      bins_box[d].send(bins_of_group[d][own][four],
                       reinterpret_cast<uint4&>(bins[d].counts[kGroup * group + four]), rank);
    }
    const int bin = kGroup - 1 - lane;
    std::uint32_t count = 0;
    bins_box[d].wait();
#pragma unroll 4
    for (std::uint32_t rank = 0; rank < size; ++rank) count += bins_of_group[d][rank][bin];
    larger = warp_inclusive_sum(count) - count;
    if (wanted - larger - 1 < count) {
      found = {static_cast<std::uint32_t>(kGroup * group + bin), count, wanted - larger};
    }
  }
};

}  // namespace dsa::cuda::topk
