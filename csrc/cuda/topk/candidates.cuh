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
#include "cuda/topk/histogram.cuh"
#include "cuda/topk/output_row.cuh"
#include "cuda/topk/score_key.cuh"

namespace dsa::cuda::topk {

template <typename Score, int kThreads>
class Candidates {
 public:
  // .x is the column, .y the key; of items appended since all were last looked at, .y is the
  // score's bits. They are appended where few threads of a warp have one, and looked at where all
  // have.
  using Item = uint2;
  using Histogram = CtaHistogram<kThreads>;

  // What the CTAs of a cluster have, each with its part of the row, one after another.
  struct Report {
    std::uint32_t count;
    std::uint32_t largest;
  };

  struct Shared {
    Histogram histogram;
    std::uint32_t num_ranked;  // items that have keys
    std::uint32_t largest;
    Report reports[kMostCtas];
    alignas(16) Item items[1];  // and on
  };

  // At the start of the CTA's shared memory.
  __device__ explicit Candidates(void* memory) : address_(ptx::pinned_shared_address(memory)) {
    shared().histogram.clear();
    set_ranked();
  }

  __device__ std::uint32_t count() const { return count_; }
  // Lower keys are no candidates any more.
  __device__ std::uint32_t at_least() const { return at_least_; }
  __device__ SharedColumns<2> columns() const { return {address_of(0)}; }

  // A barrier. Sums a value of each warp, which its last lane has.
  __device__ CtaSum sum_over_warps(std::uint32_t warp_total) {
    return topk::sum_over_warps<kThreads>(shared().histogram.warp_totals, turn_, warp_total);
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
  // calls visit(key) for the thread's keys. After a barrier.
  template <typename ForEach>
  __device__ Threshold find_threshold(Range range, std::uint32_t wanted, std::uint32_t slack,
                                      ForEach&& for_each) {
    std::uint32_t base = range.lowest;
    int bits = 32 - __clz(range.largest - base);
    std::uint32_t span = range.largest - base;  // of keys that may be the k-th largest
    while (true) {
      const int shift = std::max(bits - Histogram::kDigitBits, 0);
      for_each([&](std::uint32_t key) {
        const std::uint32_t above = key - base;
        if (above <= span) shared().histogram.bins.add(above >> shift);
      });
      const FoundBin bin = shared().histogram.find(0, wanted, turn_);
      base += bin.digit << shift;
      wanted = bin.wanted;
      if (bin.count - wanted <= slack) return {base, 0};
      if (shift == 0) return {base + 1, wanted};
      bits = shift;
      span = (1u << shift) - 1;
    }
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
