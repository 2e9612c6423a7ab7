// SPDX-License-Identifier: Apache-2.0
// Exact selection of the k largest keys of a row by one CTA, ties to the lower column.
//
// tile       a chunk: kThreads * Row::kPerThread keys. A thread holds Row::kGroups groups of
//            Row::kGroup consecutive columns; a warp's groups are consecutive, so that order within
//            a chunk is warp, group, lane, column of the group.
// passes     one over the row for each digit of the key, from the top, until the k-th largest is
//            known well enough (find_threshold); one more emits what reaches it (emit_selected).
// shared     SelectStorage, 8 KiB and a little.
// barriers   __syncthreads only; all threads of the CTA call each function, with equal arguments.
//
// A Row is what both functions read:
//   Key, kKeyBits           unsigned; the key 0 is no candidate: neither counted nor emitted
//   kGroup, kGroups, kPerThread = kGroup * kGroups
//   num_chunks()            int: rows have fewer than 2^31 columns; 0 for an empty row
//   column(chunk, group)    of the group's first key
//   load(chunk, keys)       this thread's keys of a chunk, 0 outside the row
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/topk/cta_sum.cuh"

namespace dsa::cuda::topk {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / kWarpSize;
inline constexpr int kDigitBits = 11;
inline constexpr int kNumBins = 1 << kDigitBits;
inline constexpr int kBinsPerThread = kNumBins / kThreads;
static_assert(kBinsPerThread == 4, "a thread's bins are read as one uint4");

// The bin that holds the key of a wanted rank.
struct RadixBin {
  std::uint32_t digit;
  std::uint32_t count;   // keys in the bin
  std::uint32_t wanted;  // of them
};

struct SelectStorage {
  alignas(16) std::uint32_t histogram[kNumBins];
  alignas(16) std::uint32_t warp_totals[2][kWarps];
  RadixBin found;
};

// The selected keys: those above `value` in the bits of `mask`, and the first num_ties (in column
// order) equal to it there.
template <typename Key>
struct RadixThreshold {
  Key value = 0;
  Key mask = 0;
  std::uint32_t num_ties = 0;

  __device__ bool above(Key key) const { return (key & mask) > value; }
  __device__ bool tie(Key key) const { return key != 0 && (key & mask) == value; }
};

// This thread's group, from the first column of a chunk.
template <typename Row>
__device__ int chunk_offset(int group) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  return ((warp * Row::kGroups + group) * kWarpSize + lane) * Row::kGroup;
}

// Sums a value of each warp, given by its last lane. One barrier: `totals` may be written again
// only after another one.
__device__ inline CtaSum sum_over_warps(std::uint32_t warp_total, std::uint32_t (&totals)[kWarps]) {
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == kWarpSize - 1) totals[warp] = warp_total;
  __syncthreads();
  CtaSum sum{0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) sum.before = sum.total;
    sum.total += totals[w];
  }
  return sum;
}

// This thread's bins; those of lower threads hold larger digits.
__device__ inline int first_bin() { return kNumBins - kBinsPerThread * (threadIdx.x + 1); }

__device__ inline void clear_own_bins(SelectStorage& shared) {
  *reinterpret_cast<uint4*>(&shared.histogram[first_bin()]) = uint4{0, 0, 0, 0};
}

// Counts the digit [low, low + bits) of the keys that tie with what is known of the threshold.
// An atomicAdd of 1 without a result is ATOMS.POPC.INC, which counts the lanes of a warp that share
// an address in one step: rows of equal scores do not serialise.
template <typename Row>
__device__ void count_digits(const Row& row, const RadixThreshold<typename Row::Key>& known,
                             int low, int bits, SelectStorage& shared) {
  const std::uint32_t digit_mask = (1u << bits) - 1u;
  for (int chunk = 0; chunk < row.num_chunks(); ++chunk) {
    typename Row::Key keys[Row::kPerThread];
    row.load(chunk, keys);
#pragma unroll
    for (int i = 0; i < Row::kPerThread; ++i) {
      if (!known.tie(keys[i])) continue;
      const std::uint32_t digit = static_cast<std::uint32_t>(keys[i] >> low) & digit_mask;
      atomicAdd(&shared.histogram[digit], 1u);
    }
  }
}

// Writes shared.found for the key of rank `wanted` (from 1, largest first) and returns how many
// keys the histogram counts; with fewer than `wanted`, shared.found means nothing.
__device__ inline std::uint32_t find_bin(std::uint32_t wanted, SelectStorage& shared) {
  const uint4 own = *reinterpret_cast<const uint4*>(&shared.histogram[first_bin()]);
  const std::uint32_t counts[kBinsPerThread] = {own.x, own.y, own.z, own.w};
  const std::uint32_t sum = own.x + own.y + own.z + own.w;
  const std::uint32_t inclusive = warp_inclusive_sum(sum);
  const CtaSum cta = sum_over_warps(inclusive, shared.warp_totals[0]);

  const std::uint32_t larger = cta.before + inclusive - sum;
  if (larger < wanted && wanted <= larger + sum) {  // one thread at most
    std::uint32_t left = wanted - larger;
    int bin = kBinsPerThread - 1;
#pragma unroll
    for (int b = kBinsPerThread - 1; b > 0; --b) {
      if (bin == b && left > counts[b]) {
        left -= counts[b];
        bin = b - 1;
      }
    }
    const int digit = first_bin() + bin;
    shared.found = {static_cast<std::uint32_t>(digit), shared.histogram[digit], left};
  }
  __syncthreads();
  return cta.total;
}

// The threshold of the k largest keys; of all keys, where there are fewer than k. k >= 1; fewer
// than 2^32 keys.
template <typename Row>
__device__ RadixThreshold<typename Row::Key> find_threshold(const Row& row, std::uint32_t k,
                                                            SelectStorage& shared) {
  using Key = typename Row::Key;
  RadixThreshold<Key> known{0, 0, k};
  for (int low = Row::kKeyBits; low > 0;) {
    const int bits = low < kDigitBits ? low : kDigitBits;
    low -= bits;
    clear_own_bins(shared);  // no other thread reads them before the barrier
    __syncthreads();
    count_digits(row, known, low, bits, shared);
    __syncthreads();
    if (find_bin(known.num_ties, shared) < known.num_ties) break;
    const RadixBin found = shared.found;
    known.value |= static_cast<Key>(found.digit) << low;
    known.mask |= ((Key{1} << bits) - 1) << low;
    known.num_ties = found.wanted;
    // The bin is taken whole: no need to tell its keys apart.
    if (found.count == found.wanted) break;
  }
  return known;
}

// Calls emit(rank, column, key) for each selected key, rank being its place in column order, and
// returns how many there are. Stops once it has k.
template <typename Row, typename Emit>
__device__ std::uint32_t emit_selected(const Row& row,
                                       const RadixThreshold<typename Row::Key>& threshold,
                                       std::uint32_t k, SelectStorage& shared, Emit&& emit) {
  // Two counts in one word: keys above the threshold, and ties in the upper half.
  constexpr std::uint32_t kOneAbove = 1u;
  constexpr std::uint32_t kOneTie = 1u << 16;
  static_assert(kThreads * Row::kPerThread < 1 << 16);

  const auto num_selected = [&](std::uint32_t num_above, std::uint32_t num_ties) {
    return num_above + std::min(num_ties, threshold.num_ties);
  };
  std::uint32_t num_above = 0;  // in the chunks before
  std::uint32_t num_ties = 0;
  for (int chunk = 0; chunk < row.num_chunks(); ++chunk) {
    if (num_selected(num_above, num_ties) >= k) break;
    typename Row::Key keys[Row::kPerThread];
    row.load(chunk, keys);

    std::uint32_t before[Row::kGroups];  // in the warp's groups before, and in the lanes before
    std::uint32_t warp_total = 0;
#pragma unroll
    for (int g = 0; g < Row::kGroups; ++g) {
      std::uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < Row::kGroup; ++i) {
        const auto key = keys[g * Row::kGroup + i];
        own += threshold.above(key) ? kOneAbove : threshold.tie(key) ? kOneTie : 0u;
      }
      const std::uint32_t inclusive = warp_inclusive_sum(own);
      before[g] = warp_total + inclusive - own;
      warp_total += __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
    }
    // Two buffers in turn: the barrier of the next chunk stands between this read and a rewrite.
    const CtaSum cta = sum_over_warps(warp_total, shared.warp_totals[chunk % 2]);

#pragma unroll
    for (int g = 0; g < Row::kGroups; ++g) {
      const std::uint32_t counts = cta.before + before[g];
      std::uint32_t above = num_above + counts % kOneTie;
      std::uint32_t ties = num_ties + counts / kOneTie;
#pragma unroll
      for (int i = 0; i < Row::kGroup; ++i) {
        const auto key = keys[g * Row::kGroup + i];
        const bool is_above = threshold.above(key);
        const bool is_tie = threshold.tie(key);
        if (is_above || (is_tie && ties < threshold.num_ties)) {
          emit(num_selected(above, ties), row.column(chunk, g) + i, key);
        }
        above += is_above ? 1u : 0u;
        ties += is_tie ? 1u : 0u;
      }
    }
    num_above += cta.total % kOneTie;
    num_ties += cta.total / kOneTie;
  }
  return num_selected(num_above, num_ties);
}

}  // namespace dsa::cuda::topk
