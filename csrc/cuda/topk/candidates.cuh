// SPDX-License-Identifier: Apache-2.0
// Candidates for the k largest of a row: (key, column) in shared memory, in column order, and the
// key below which nothing can be one any more. All threads of a CTA call each function, with equal
// arguments.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/topk/cta_sum.cuh"
#include "cuda/topk/score_key.cuh"

namespace dsa::cuda::topk {

inline constexpr int kMostCtas = 16;  // of a cluster

template <typename Score, int kThreads>
class Candidates {
 public:
  // .x is the column, .y the key; of items appended since all were last looked at, .y is the
  // score's bits. They are appended where few threads of a warp have one, and looked at where all
  // have.
  using Item = uint2;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kNumBins = std::min(4 * kThreads, 2048);
  static constexpr int kBinsPerThread = kNumBins / kThreads;
  static constexpr int kDigitBits = 31 - __builtin_clz(kNumBins);
  static_assert(1 << kDigitBits == kNumBins && kWarps <= kWarpSize);

  // What the CTAs of a cluster have, each with its part of the row, one after another.
  struct Report {
    std::uint32_t count;
    std::uint32_t largest;
  };

  struct Shared {
    alignas(16) std::uint32_t histogram[kNumBins];
    std::uint32_t warp_totals[2][kWarps];
    std::uint32_t num_ranked;  // items that have keys
    std::uint32_t largest;
    std::uint32_t digit, count, wanted;  // the bin that holds the k-th largest; left to take of it
    Report reports[kMostCtas];
    alignas(16) Item items[1];  // and on
  };

  // At the start of the CTA's shared memory.
  __device__ explicit Candidates(void* shared) : address_(ptx::pinned_shared_address(shared)) {
    set_ranked();
  }

  __device__ std::uint32_t count() const { return count_; }
  // Lower keys are no candidates any more.
  __device__ std::uint32_t at_least() const { return at_least_; }
  __device__ std::uint32_t column(std::uint32_t i) const { return shared().items[i].x; }

  // A barrier. Sums a value of each warp, which its last lane has.
  __device__ CtaSum sum_over_warps(std::uint32_t warp_total) {
    // Two buffers in turn: the next sum's barrier stands between these reads and a rewrite.
    std::uint32_t (&totals)[kWarps] = shared().warp_totals[turn_];
    turn_ ^= 1;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (lane == kWarpSize - 1) totals[warp] = warp_total;
    __syncthreads();
    const std::uint32_t total = lane < kWarps ? totals[lane] : 0;
    return {__reduce_add_sync(kAllLanes, lane < warp ? total : 0),
            __reduce_add_sync(kAllLanes, total)};
  }

  // Where append_if() puts (column, score's bits).
  __device__ std::uint32_t address_of(std::uint32_t i) const {
    return address_ + static_cast<std::uint32_t>(offsetof(Shared, items)) + i * sizeof(Item);
  }
  // By those put after the last. Once there are k, what comes later and only equals the least of
  // them is no candidate.
  __device__ void grow(std::uint32_t more, std::uint32_t k) {
    if (count_ < k && count_ + more >= k) ++at_least_;
    count_ += more;
  }
  __device__ void clear() {
    count_ = 0;
    at_least_ = 0;
    set_ranked();
  }

  // Sets the key below which nothing is a candidate so that of a sample, of which each thread has
  // some keys, at least `rank` would be candidates, and not many more.
  template <typename Sample>
  __device__ void guess(const Sample& sample, std::uint32_t rank) {
    at_least_ = guessed(*this, sample, rank);
  }

  // Keeps the k largest. Items put before a barrier; ends without one. A call, so that its
  // registers are not taken from the loop over the scores.
  __device__ void keep(std::uint32_t k) { *this = kept(*this, k); }

  // Tells all CTAs of the cluster what this one has; returns how many candidates there are. Between
  // two reports is a barrier of the cluster.
  __device__ std::uint32_t report() {
    const std::uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size();
    const Report own = {count_, largest_key()};
    set_ranked();
    if (threadIdx.x < size) ptx::of_cta(shared().reports[rank], threadIdx.x) = own;
    ptx::cluster_sync();
    std::uint32_t all = 0;
    for (std::uint32_t r = 0; r < size; ++r) all += shared().reports[r].count;
    return all;
  }

  // By the first CTA: keeps the k largest of the cluster's, as they were reported. There is room
  // for all, or for k and then for any one CTA's. Meanwhile the others stay as they are.
  __device__ void keep_of_cluster(std::uint32_t k, std::uint32_t room) {
    const std::uint32_t size = ptx::cluster_size();
    const auto wanted = [&](std::uint32_t r) {
      return shared().reports[r].largest >= at_least_ ? shared().reports[r].count : 0;
    };
    std::uint32_t next = 1;
    do {
      const std::uint32_t first = next;
      std::uint32_t more = 0;
      for (; next < size && count_ + more + wanted(next) <= room; ++next) more += wanted(next);
      for (std::uint32_t i = threadIdx.x; i < more; i += kThreads) {
        std::uint32_t r = first, at = i;
        for (; at >= wanted(r); ++r) at -= wanted(r);
        shared().items[count_ + i] = ptx::of_cta(shared().items[at], r);
      }
      count_ += more;
      set_ranked();
      if (count_ > k) keep(k);
    } while (next < size);
  }

 private:
  // Two counts in one word: items taken, and ties.
  static constexpr std::uint32_t kOneTie = 1u << 16;

  struct Range {
    std::uint32_t lowest, largest;
  };

  // Taken: keys from at_least on, and the first num_ties, in column order, of those one below.
  struct Threshold {
    std::uint32_t at_least = 0;
    std::uint32_t num_ties = 0;

    __device__ bool takes(std::uint32_t key) const { return key >= at_least; }
    __device__ bool ties(std::uint32_t key) const { return key + 1 == at_least; }
  };

  __device__ Shared& shared() const {
    return *static_cast<Shared*>(__cvta_shared_to_generic(address_));
  }

  template <typename Sample>
  static __device__ __noinline__ std::uint32_t guessed(Candidates none, Sample sample,
                                                       std::uint32_t rank) {
    const auto for_each = [&](auto&& visit) {
#pragma unroll
      for (const std::uint32_t key : sample.keys) visit(key);
    };
    std::uint32_t largest = 0;
    for_each([&](std::uint32_t key) { largest = std::max(largest, key); });
    const Range range = {0, none.largest_of_threads(largest)};
    const Threshold found = none.find_threshold(range, rank, rank / 4, for_each);
    return found.at_least - (found.num_ties > 0 ? 1 : 0);
  }

  static __device__ __noinline__ Candidates kept(Candidates all, std::uint32_t k) {
    const Range range = {all.lowest(), all.largest_key()};
    const Threshold threshold =
        all.find_threshold(range, k, 0, [&](auto&& visit) { all.for_each_key(visit); });
    if (threshold.num_ties > 0) {
      all.template compact<true>(threshold);
    } else {
      all.template compact<false>(threshold);
    }
    all.at_least_ = threshold.at_least;
    all.set_ranked();
    return all;
  }

  // Of ties too, no candidate is below.
  __device__ std::uint32_t lowest() const { return at_least_ - (at_least_ > 0 ? 1 : 0); }

  // All items have keys.
  __device__ void set_ranked() const {
    if (threadIdx.x == 0) shared().num_ranked = count_;
  }

  // This thread's bins; those of lower threads hold larger digits.
  static __device__ int first_bin() { return kNumBins - kBinsPerThread * (threadIdx.x + 1); }

  struct alignas(4 * kBinsPerThread) Bins {
    std::uint32_t counts[kBinsPerThread];
  };

  __device__ void clear_own_bins() const {
    *reinterpret_cast<Bins*>(&shared().histogram[first_bin()]) = Bins{};
  }

  template <typename Visit>
  __device__ void for_each_key(Visit&& visit) const {
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < count_; i += kThreads) visit(shared().items[i].y);
  }

  // Begins and ends with a barrier.
  __device__ std::uint32_t largest_of_threads(std::uint32_t own) const {
    if (threadIdx.x == 0) shared().largest = 0;
    __syncthreads();
    const std::uint32_t largest = __reduce_max_sync(kAllLanes, own);
    if (threadIdx.x % kWarpSize == 0) atomicMax(&shared().largest, largest);
    __syncthreads();
    return shared().largest;
  }

  // Of this CTA; begins and ends with a barrier. From here on all items have keys.
  __device__ std::uint32_t largest_key() {
    __syncthreads();
    const std::uint32_t num_ranked = shared().num_ranked;
    std::uint32_t largest = 0;
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < count_; i += kThreads) {
      std::uint32_t key = shared().items[i].y;
      if (i >= num_ranked) {
        key = score_key<Score>(static_cast<typename Score::Bits>(key));
        shared().items[i].y = key;
      }
      largest = std::max(largest, key);
    }
    return largest_of_threads(largest);
  }

  // Digit after digit of key - lowest, from the highest that tells keys of the range apart. Keys
  // with the same digits so far are taken as well if they are `slack` at most. for_each(visit)
  // calls visit(key) for the thread's keys.
  template <typename ForEach>
  __device__ Threshold find_threshold(Range range, std::uint32_t wanted, std::uint32_t slack,
                                      ForEach&& for_each) {
    std::uint32_t base = range.lowest;
    int bits = 32 - __clz(range.largest - base);
    std::uint32_t span = range.largest - base;  // of keys that may be the k-th largest
    while (true) {
      const int shift = std::max(bits - kDigitBits, 0);
      clear_own_bins();
      __syncthreads();
      // An atomicAdd of 1 without a result counts the lanes that share an address in one step.
      for_each([&](std::uint32_t key) {
        const std::uint32_t above = key - base;
        if (above <= span) atomicAdd(&shared().histogram[above >> shift], 1u);
      });
      __syncthreads();
      find_bin(wanted);
      base += shared().digit << shift;
      wanted = shared().wanted;
      if (shared().count - wanted <= slack) return {base, 0};
      if (shift == 0) return {base + 1, wanted};
      bits = shift;
      span = (1u << shift) - 1;
    }
  }

  // Writes the bin that holds the key of rank `wanted`, from 1, largest first. There is one.
  __device__ void find_bin(std::uint32_t wanted) {
    const Bins own = *reinterpret_cast<const Bins*>(&shared().histogram[first_bin()]);
    std::uint32_t sum = 0;
    for (const std::uint32_t count : own.counts) sum += count;
    const std::uint32_t inclusive = warp_inclusive_sum(sum);
    const std::uint32_t larger = sum_over_warps(inclusive).before + inclusive - sum;
    if (larger < wanted && wanted <= larger + sum) {  // one thread
      std::uint32_t left = wanted - larger;
      int bin = kBinsPerThread - 1;
      std::uint32_t count = own.counts[bin];
#pragma unroll
      for (int b = kBinsPerThread - 1; b > 0; --b) {
        if (bin == b && left > own.counts[b]) {
          left -= own.counts[b];
          bin = b - 1;
          count = own.counts[b - 1];
        }
      }
      shared().digit = first_bin() + bin;
      shared().count = count;
      shared().wanted = left;
    }
    __syncthreads();
  }

  // Keeps what the threshold takes, in order and in place: what a barrier has let all threads read
  // of a chunk of items is written to where it or earlier chunks were.
  // kTies: the threshold has some.
  template <bool kTies>
  __device__ void compact(const Threshold& threshold) {
    constexpr int kGroups = 4;
    constexpr std::uint32_t kChunk = kThreads * kGroups;
    const std::uint32_t lane = threadIdx.x % kWarpSize;
    const std::uint32_t lower_lanes = (1u << lane) - 1;
    const std::uint32_t first = threadIdx.x / kWarpSize * (kGroups * kWarpSize) + lane;
    std::uint32_t taken = 0, ties = 0;  // in the chunks before
    for (std::uint32_t chunk = 0; chunk < count_; chunk += kChunk) {
      Item items[kGroups] = {};  // a key is never 0
      std::uint32_t before[kGroups];
      std::uint32_t warp_total = 0;
      const bool has_any = chunk + first - lane < count_;  // this warp
      if (has_any) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const std::uint32_t i = chunk + first + g * kWarpSize;
          if (i < count_) items[g] = shared().items[i];
          const std::uint32_t key = items[g].y;
          const std::uint32_t is_taken = __ballot_sync(kAllLanes, key != 0 && threshold.takes(key));
          before[g] = warp_total + __popc(is_taken & lower_lanes);
          warp_total += __popc(is_taken);
          if constexpr (kTies) {
            const std::uint32_t is_tie = __ballot_sync(kAllLanes, key != 0 && threshold.ties(key));
            before[g] += kOneTie * __popc(is_tie & lower_lanes);
            warp_total += kOneTie * __popc(is_tie);
          }
        }
      }
      const CtaSum sum = sum_over_warps(warp_total);
      if (has_any) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const std::uint32_t key = items[g].y;
          const std::uint32_t counts = sum.before + before[g];
          std::uint32_t to = taken + counts % kOneTie;
          bool is_kept = key != 0 && threshold.takes(key);
          if constexpr (kTies) {
            const std::uint32_t ties_before = ties + counts / kOneTie;
            is_kept |= key != 0 && threshold.ties(key) && ties_before < threshold.num_ties;
            to += std::min(ties_before, threshold.num_ties);
          }
          if (is_kept) shared().items[to] = items[g];
        }
      }
      taken += sum.total % kOneTie;
      ties += sum.total / kOneTie;
    }
    count_ = taken + std::min(ties, threshold.num_ties);
  }

  std::uint32_t address_;  // of Shared
  std::uint32_t count_ = 0;
  std::uint32_t turn_ = 0;
  std::uint32_t at_least_ = 0;
};

}  // namespace dsa::cuda::topk
