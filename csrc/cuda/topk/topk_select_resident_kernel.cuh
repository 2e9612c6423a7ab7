// SPDX-License-Identifier: Apache-2.0
// topk_select of rows whose keys stay in registers: all scores are read once, and at once.
//
// tile       a row, or a CTA's part of one: 16 or 32 keys a thread.
// roles      all threads alike. Digit after digit of the keys, a histogram tells which the k-th
//            largest has; what is larger, and of its equals the first, is written to shared memory
//            in column order, and from there out.
// threads    32 to 1024, by the columns.
// cluster    few rows: each CTA has a part of the row. They send each other their histograms, and
//            how many columns they take; each writes out its own.
// registers  64 at most; 72 with 32 threads.
// shared     a histogram, 8 KiB (in a cluster one for each digit, and what others sent, 43 KiB); 4
//            bytes a column taken.
// barriers   of the CTA: three or four a digit, three more; in a cluster an mbarrier for each of
//            two messages a digit, one for the last message, and one barrier of the cluster at the
//            start, which no write waits for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/common/launch.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/topk/histogram.cuh"
#include "cuda/topk/output_row.cuh"
#include "cuda/topk/row_part.cuh"
#include "cuda/topk/score_key.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

// Consecutive columns of a row, their scores and then their keys in the registers of a CTA: by
// warp, register, lane.
template <typename Score, int kThreads, int kKeys>
class ResidentKeys {
 public:
  using Bits = typename Score::Bits;

  // Reads part `part` of `parts` of a window's columns; `row` is column 0. A part fits.
  __device__ ResidentKeys(const Bits* row, const RowWindow& window, std::uint32_t part,
                          std::uint32_t parts) {
    const auto size = static_cast<std::uint32_t>(window.size());
    const std::uint32_t each = ceil_div(size, parts);
    const std::uint32_t first = std::min(part * each, size);
    const std::uint32_t of_warp = first + threadIdx.x / kWarpSize * (kKeys * kWarpSize);
    column_ = window.begin + of_warp + threadIdx.x % kWarpSize;
    end_ = window.begin + std::min(first + each, size);
    const Bits* scores = row + column_;
    asm volatile("" : "+l"(scores));  // as a value: the compiler would find each address anew
    const auto load = [&](int i) { keys_[i] = __ldcs(scores + i * kWarpSize); };
    if (of_warp + kKeys * kWarpSize <= end_ - window.begin) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) load(i);
    } else {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        keys_[i] = 0;
        if (column(i) < end_) load(i);
      }
    }
  }

  // From now on there are keys: 0 for what is not the window's, or another part's.
  __device__ void rank(const RowWindow& window) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys_[i] = score_key<Score>(static_cast<Bits>(keys_[i]));
    const auto begin = static_cast<std::uint32_t>(window.begin);
    const std::uint32_t end = std::min(static_cast<std::uint32_t>(window.end), end_);
    const std::uint32_t size = std::max(end, begin) - begin;
    const auto is_inside = [&](int i) { return column(i) - begin < size; };
    if (__all_sync(kAllLanes, is_inside(0) && is_inside(kKeys - 1))) return;
    bool has_any = false;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (!is_inside(i)) keys_[i] = 0;
      has_any |= is_inside(i);
    }
    has_any_ = __any_sync(kAllLanes, has_any);
  }

  // visit(key, column), by warps that have any.
  template <typename Visit>
  __device__ void for_each(Visit&& visit) const {
    if (!has_any_) return;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) visit(keys_[i], column(i));
  }

 private:
  __device__ std::uint32_t column(int i) const { return column_ + i * kWarpSize; }

  std::uint32_t keys_[kKeys];
  std::uint32_t column_;  // of this thread's first
  std::uint32_t end_;     // of the part's columns
  bool has_any_ = true;   // this warp
};

template <typename Score, int kThreads, int kKeys, bool kInCluster>
class ResidentTopk {
 public:
  using Keys = ResidentKeys<Score, kThreads, kKeys>;
  static constexpr int kDigitBits = Bins<kThreads>::kDigitBits;
  static constexpr int kDigits = ceil_div(Score::kKeyBits, kDigitBits);
  using Histogram =
      std::conditional_t<kInCluster, ClusterHistogram<kThreads, kDigits>, CtaHistogram<kThreads>>;

  struct Shared {
    Histogram histogram;
    std::uint32_t columns[1];  // and on
  };

  __device__ explicit ResidentTopk(void* memory) : address_(ptx::pinned_shared_address(memory)) {
    shared().histogram.clear();
  }
  // All CTAs of the cluster have begun.
  __device__ void wait_for_all() { shared().histogram.wait_for_all(); }

  // Digit after digit, from the highest. A loop, since code that runs again is there already.
  __device__ Threshold find_threshold(const Keys& keys, std::uint32_t wanted) {
    __syncthreads();
    std::uint32_t base = 0;
    int bits = Score::kKeyBits;  // which keys that may be the k-th largest have above `base`
#pragma unroll 1
    for (int d = 0;; ++d) {
      const int shift = std::max(bits - kDigitBits, 0);
      // They take the uppermost bins; larger keys are past the last, and lower ones below them.
      base -= ((1u << kDigitBits) - (1u << (bits - shift))) << shift;
      Bins<kThreads>& bins = shared().histogram.of_digit(d);
      keys.for_each([&](std::uint32_t key, std::uint32_t) { bins.add(key - base >> shift); });
      const FoundBin found = shared().histogram.find(d, wanted, turn_);
      base += found.digit << shift;
      wanted = found.wanted;
      if (found.count == wanted) return {base, 0};
      if (shift == 0) return {base + 1, wanted};
      bits = shift;
    }
  }

  // Puts what the threshold takes in order. Returns where in the row's output this CTA's begin.
  __device__ std::uint32_t take(const Keys& keys, const Threshold& threshold) {
    const bool has_ties = threshold.num_ties > 0;
    std::uint32_t own = 0;
    keys.for_each([&](std::uint32_t key, std::uint32_t) { own += threshold.takes(key) ? 1 : 0; });
    if (has_ties) {
      keys.for_each(
          [&](std::uint32_t key, std::uint32_t) { own += threshold.ties(key) ? kOneTie : 0; });
    }
    const CtaSum sum = sum_over_warps<kThreads>(shared().histogram.warp_totals, turn_,
                                                __reduce_add_sync(kAllLanes, own));
    std::uint32_t wanted = threshold.num_ties, first = 0;
    if constexpr (kInCluster) first = report(sum.total, wanted);
    count_ = sum.total % kOneTie + std::min(sum.total / kOneTie, wanted);
    std::uint32_t taken = sum.before % kOneTie, ties = sum.before / kOneTie;
    const std::uint32_t lower_lanes = (1u << threadIdx.x % kWarpSize) - 1;
    if (!has_ties) {
      keys.for_each([&](std::uint32_t key, std::uint32_t column) {
        const bool takes = threshold.takes(key);
        const std::uint32_t lanes = __ballot_sync(kAllLanes, takes);
        if (takes) shared().columns[taken + __popc(lanes & lower_lanes)] = column;
        taken += __popc(lanes);
      });
    } else {
      keys.for_each([&](std::uint32_t key, std::uint32_t column) {
        const std::uint32_t lanes = __ballot_sync(kAllLanes, threshold.takes(key));
        const std::uint32_t tie_lanes = __ballot_sync(kAllLanes, threshold.ties(key));
        const std::uint32_t ties_before = ties + __popc(tie_lanes & lower_lanes);
        if (threshold.takes(key) || (threshold.ties(key) && ties_before < wanted)) {
          const std::uint32_t before = taken + __popc(lanes & lower_lanes);
          shared().columns[before + std::min(ties_before, wanted)] = column;
        }
        taken += __popc(lanes);
        ties += __popc(tie_lanes);
      });
    }
    return first;
  }

  // What is taken are places of a list.
  __device__ void look_up(const std::int32_t* columns) {
    for (std::uint32_t i = threadIdx.x; i < count_; i += kThreads) {
      shared().columns[i] = columns[shared().columns[i]];
    }
  }

  __device__ std::uint32_t count() const { return count_; }
  __device__ SharedColumns<1> columns() const {
    return {address_ + static_cast<std::uint32_t>(offsetof(Shared, columns))};
  }

 private:
  // Two counts in one word: keys taken, and ties.
  static constexpr std::uint32_t kOneTie = 1u << 16;

  __device__ Shared& shared() const {
    return *static_cast<Shared*>(__cvta_shared_to_generic(address_));
  }

  // Of `wanted` ties leaves those after the ties of lower CTAs; returns how many columns these
  // take.
  __device__ std::uint32_t report(std::uint32_t total, std::uint32_t& wanted) {
    const std::uint32_t lower = shared().histogram.tell(total);
    const std::uint32_t taken = __reduce_add_sync(kAllLanes, lower % kOneTie);
    const std::uint32_t ties = std::min(__reduce_add_sync(kAllLanes, lower / kOneTie), wanted);
    wanted -= ties;
    return taken + ties;
  }

  std::uint32_t address_;  // of Shared
  std::uint32_t turn_ = 0;
  std::uint32_t count_ = 0;
};

// early: rows are read before their windows are known, since what is waited for then is one
// latency instead of two.
template <typename Score, int kThreads, int kKeys, bool kInCluster>
__global__ void __launch_bounds__(kThreads, ctas_of_sm(kThreads))
    portable_topk_select_resident_kernel(bool early, const __grid_constant__ TopkTask task) {
  using Own = RowPart<kInCluster>;
  extern __shared__ uint4 shared_bytes[];

  ResidentTopk<Score, kThreads, kKeys, kInCluster> topk(shared_bytes);
  RowWindow window(0, task.columns);
  if (!early) window = window_of(task, Own::row());
  ResidentKeys<Score, kThreads, kKeys> keys(
      task.row_scores<typename Score::Bits>(task.source_row(Own::row())), window, Own::part(),
      Own::parts());
  if (early) window = window_of(task, Own::row());
  topk.wait_for_all();
  if (window.size() <= task.k) {
    write_short_row<Score, kThreads, Own>(task, window);
    return;
  }
  prefetch_pages(task, Own::row(), window, Own::part(), Own::parts());
  keys.rank(window);
  const Threshold threshold = topk.find_threshold(keys, task.k);
  const std::uint32_t first = topk.take(keys, threshold);
  __syncthreads();
  write_columns<Score, kThreads>(task, Own::row(), first, topk.count(), topk.columns());
}

// What was selected of each piece of each row: scores and columns [rows, pieces * k].
struct PieceLists {
  const float* scores;
  const std::int32_t* columns;
  FastDivisor31 pieces;
};

// The k best of a row, of whose pieces the k best are known.
template <typename Score, int kThreads, int kKeys>
__global__ void __launch_bounds__(kThreads, ctas_of_sm(kThreads))
    portable_topk_select_listed_kernel(const __grid_constant__ PieceLists lists,
                                       const __grid_constant__ TopkTask task) {
  using Own = RowPart<false>;
  extern __shared__ uint4 shared_bytes[];

  ResidentTopk<F32Score, kThreads, kKeys, false> topk(shared_bytes);
  const std::uint32_t places = lists.pieces.divisor() * task.k;
  const std::int64_t first = Own::row() * places;
  const RowWindow window(task, Own::row());
  ResidentKeys<F32Score, kThreads, kKeys> keys(
      reinterpret_cast<const std::uint32_t*>(lists.scores) + first,
      RowWindow(0, static_cast<int>(places)), 0, 1);
  if (window.size() <= task.k) {
    write_short_row<Score, kThreads, Own>(task, window);
    return;
  }
  prefetch_pages(task, Own::row(), window, Own::part(), Own::parts());
  const WindowPieces pieces(window, lists.pieces, task.k);
  keys.rank(RowWindow(0, static_cast<int>(pieces.num_selected(task.k))));
  const Threshold threshold = topk.find_threshold(keys, task.k);
  topk.take(keys, threshold);
  __syncthreads();
  topk.look_up(lists.columns + first);
  __syncthreads();
  write_columns<Score, kThreads>(task, Own::row(), 0, topk.count(), topk.columns());
}

}  // namespace dsa::cuda::topk
