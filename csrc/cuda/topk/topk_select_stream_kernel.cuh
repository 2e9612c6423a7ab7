// SPDX-License-Identifier: Apache-2.0
// topk_select in one pass over the scores: candidates are collected in column order above a
// threshold that rises.
//
// guess      a first threshold, by a sample of the row: candidates are not many more than k then.
//            Should they be fewer, all is done again without.
// tile       a chunk of 8192 scores (with 128 threads 2048): 16 a thread, with 1024 threads 8, in
//            registers; the next chunk is on its way to L2.
// roles      all threads alike. Of a chunk, what the threshold lets pass is appended to the
//            candidates (candidates.cuh). When they are full, the k largest are kept, and only what
//            is larger than the least of them passes from then on. At the end the k largest are
//            kept again, and are in order already. Equal scores need no care either: of them the
//            first are kept, and later ones do not pass.
// threads    512, two CTAs an SM; little shared memory: 128; few rows: 1024, one CTA an SM.
// cluster    fewer rows still: each CTA collects from its part of the row, and the first one takes
//            over what all have.
// registers  at most 64.
// shared     a histogram, 8 KiB; 8 bytes a candidate, of which there is room for k and a chunk.
// barriers   one a chunk, between counting and appending; those of candidates.cuh.
#pragma once

#include <cstdint>

#include "core/float_bits.h"
#include "cuda/common/launch.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/topk/candidates.cuh"
#include "cuda/topk/cta_sum.cuh"
#include "cuda/topk/output_row.cuh"
#include "cuda/topk/row_part.cuh"
#include "cuda/topk/score_key.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

// Of a chunk. With more threads fewer, for a short way from the first to the last.
inline constexpr int scores_per_thread(int threads) { return threads > 512 ? 8 : 16; }

// Scores of consecutive columns, at one chunk of them. A thread's are in groups of 16 bytes, at
// multiples of 16 bytes; a warp's groups are consecutive, so that order within a chunk is warp,
// group, lane, score of the group.
template <typename Score, int kThreads>
class ScoreStream {
 public:
  using Bits = typename Score::Bits;
  static constexpr int kScores = scores_per_thread(kThreads);  // of a thread
  static constexpr int kGroup = sizeof(uint4) / sizeof(Bits);
  static constexpr int kGroups = kScores / kGroup;
  static constexpr int kPerWord = sizeof(std::uint32_t) / sizeof(Bits);
  static constexpr int kChunk = kThreads * kScores;

  struct Chunk {
    std::uint32_t words[kScores / kPerWord];

    __device__ Bits bits(int i) const {
      return static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 16));
    }
    __device__ void set(int group, const uint4& vector) {
      words[4 * group] = vector.x;
      words[4 * group + 1] = vector.y;
      words[4 * group + 2] = vector.z;
      words[4 * group + 3] = vector.w;
    }
  };

  // Part `part` of `parts` of the window's columns; `row` is column 0.
  __device__ ScoreStream(const Bits* row, const RowWindow& window, std::uint32_t part,
                         std::uint32_t parts) {
    const auto address = reinterpret_cast<std::uintptr_t>(row + window.begin);
    const auto lead = static_cast<std::uint32_t>(address % sizeof(uint4) / sizeof(Bits));
    const std::uint32_t size = window.size() + lead;
    const std::uint32_t groups = ceil_div<std::uint32_t>(size, kGroup);
    const std::uint32_t each = ceil_div(groups, parts) * kGroup;
    const std::uint32_t first = std::min(part * each, size);
    column_ = window.begin - lead + first + own_offset();
    scores_ = row + window.begin - lead + first + own_offset();
    begin_ = first == 0 ? lead : 0;
    left_ = std::min(each, size - first);
    // As values to the compiler, which would keep the terms of the sums.
    asm volatile("" : "+l"(scores_), "+r"(column_));
  }

  // A thread's group of `kThreads` that are spread over the columns, each of a whole group.
  static constexpr std::uint32_t kSample = kThreads * kGroup;
  struct Sample {
    std::uint32_t keys[kGroup];
  };
  __device__ Sample load_sample() const {
    const std::uint32_t first = ceil_div<std::uint32_t>(begin_, kGroup);
    const std::uint32_t groups = left_ / kGroup - first;
    const std::uint32_t group = first + std::uint64_t{threadIdx.x} * groups / kThreads;
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(scores_ - own_offset()) + group);
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    Sample sample;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sample.keys[i] =
          score_key<Score>(static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 16)));
    }
    return sample;
  }

  // Of this thread's scores, from its first.
  static constexpr int offset_of_group(int g) { return g * (kWarpSize * kGroup); }
  static constexpr int offset_of_score(int i) { return offset_of_group(i / kGroup) + i % kGroup; }
  // Of that one from the chunk's first. Calculated where it is needed: the compiler would keep the
  // offset of each score in a register.
  static __device__ std::uint32_t own_offset() {
    const std::uint32_t thread = ptx::thread_index();
    return (thread / kWarpSize * (kGroups * kWarpSize) + thread % kWarpSize) * kGroup;
  }

  __device__ bool is_empty() const { return left_ <= begin_; }
  // Of this thread's score i.
  __device__ std::uint32_t column(int i) const { return column_ + offset_of_score(i); }

  __device__ void load(Chunk& scores) const {
    if (is_full()) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        scores.set(g, __ldcs(reinterpret_cast<const uint4*>(scores_ + offset_of_group(g))));
      }
    } else {
      const std::uint32_t own = own_offset();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        scores.set(g, load_edge_group(scores_ + offset_of_group(g), own + offset_of_group(g)));
      }
    }
  }
  // Brings a chunk, `ahead` scores from this one, into L2.
  __device__ void prefetch(std::uint32_t ahead) const {
    const Bits* const first = scores_ + ahead;
    if (left_ >= ahead + kChunk) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) ptx::prefetch_l2(first + offset_of_group(g));
    } else if (left_ > ahead) {
      const std::uint32_t own = ahead + own_offset();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (own + offset_of_group(g) < left_) ptx::prefetch_l2(first + offset_of_group(g));
      }
    }
  }
  // On to the next chunk, if there is one.
  __device__ bool advance() {
    if (left_ <= kChunk) return false;
    scores_ += kChunk;
    column_ += kChunk;
    begin_ = 0;
    left_ -= kChunk;
    return true;
  }

  // A bit for each score that passes.
  __device__ std::uint32_t passing(const Chunk& scores, std::uint32_t at_least) const {
    constexpr int kBelow = 32 - Score::kKeyBits;  // bits of an fp32 key that are not kept
    constexpr std::uint32_t kMinusInf = ordered_key(float_from_bits(kF32SignBit | kF32InfBits));
    std::uint32_t passes = 0;
    if (at_least > kMinusInf >> kBelow) {
      const float bound = float_of_ordered_key(at_least << kBelow);
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (Score::ranked(scores.bits(i)) >= bound) passes |= 1u << i;
      }
    } else {  // NaN may pass
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (score_key<Score>(scores.bits(i)) >= at_least) passes |= 1u << i;
      }
    }
    if (!is_full()) {
      const std::uint32_t own = own_offset();
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (!has(own + offset_of_score(i))) passes &= ~(1u << i);
      }
    }
    return passes;
  }

 private:
  __device__ bool has(std::uint32_t at) const { return at >= begin_ && at < left_; }
  // Whether all of the warp's scores of the chunk are the window's.
  __device__ bool is_full() const {
    constexpr std::uint32_t kWarpScores = kWarpSize * kScores;
    const std::uint32_t first = own_offset() / kWarpScores * kWarpScores;
    return first >= begin_ && first + kWarpScores <= left_;
  }

  // A group that may not be all the window's.
  __device__ uint4 load_edge_group(const Bits* group, std::uint32_t at) const {
    if (at >= begin_ && at + kGroup <= left_) return __ldcs(reinterpret_cast<const uint4*>(group));
    std::uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (has(at + i)) words[i / kPerWord] |= std::uint32_t{group[i]} << (i % kPerWord * 16);
    }
    return {words[0], words[1], words[2], words[3]};
  }

  const Bits* scores_;          // this thread's first
  std::uint32_t column_;        // of that
  std::uint32_t begin_, left_;  // offsets from the chunk's first of what is the window's
};

template <typename Score, int kThreads>
class TopkStream {
 public:
  using Stream = ScoreStream<Score, kThreads>;
  using Chunk = typename Stream::Chunk;

  __device__ TopkStream(Candidates<Score, kThreads>& candidates, std::uint32_t capacity,
                        std::uint32_t k)
      : candidates_(candidates), capacity_(capacity), k_(k) {}

  // A threshold that probably more than k of the whole row's scores pass, by a sample of them.
  __device__ void guess(const Stream& row, std::uint32_t size) {
    constexpr std::uint32_t kSample = Stream::kSample;
    if (size < 2 * kSample) return;
    // So many of the sample as are among the k largest, and four standard deviations.
    const float n = size, mean = kSample * (k_ / n);
    const float variance = mean * (1 - k_ / n) * (1 - kSample / n);
    const auto rank = static_cast<std::uint32_t>(mean + 4 * sqrtf(variance) + 8);
    if (rank > kSample / 2) return;
    candidates_.guess(row.load_sample(), rank);
  }

  // To the end of the scores.
  __device__ void collect(Stream& scores) {
    if (scores.is_empty()) return;
    while (!append_all(scores)) candidates_.keep(k_);
  }

 private:
  static constexpr int kGroup = Stream::kGroup;
  static constexpr int kGroups = Stream::kGroups;
  // The counts of a warp's groups in one word.
  static constexpr int kCountBits = 32 / kGroups;
  static constexpr std::uint32_t kCountMask = ~0u >> (32 - kCountBits);
  static_assert(kWarpSize * kGroup <= kCountMask);

  // Up to the chunk for which there is no room.
  __device__ bool append_all(Stream& stream) {
    do {
      Chunk scores;
      stream.load(scores);
      stream.prefetch(Stream::kChunk);
      if (!append(stream, scores)) return false;
    } while (stream.advance());
    return true;
  }

  // Unless there is no room.
  __device__ bool append(const Stream& stream, const Chunk& scores) {
    const std::uint32_t passes = stream.passing(scores, candidates_.at_least());
    std::uint32_t counts = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      counts |= __popc(passes >> g * kGroup & ((1u << kGroup) - 1)) << g * kCountBits;
    }
    const std::uint32_t inclusive = warp_inclusive_sum(counts);
    const std::uint32_t warp_counts = __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
    std::uint32_t warp_total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) warp_total += count_of_group(warp_counts, g);
    const CtaSum sum = candidates_.sum_over_warps(warp_total);
    if (candidates_.count() + sum.total > capacity_) return false;
    std::uint32_t position = candidates_.count() + sum.before;
    candidates_.grow(sum.total, k_);
    if (passes == 0) return true;
    const std::uint32_t before = inclusive - counts;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      std::uint32_t address = candidates_.address_of(position + count_of_group(before, g));
#pragma unroll
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        ptx::append_if(passes & 1u << i, address, stream.column(i), scores.bits(i));
      }
      position += count_of_group(warp_counts, g);
    }
    return true;
  }

  static __device__ std::uint32_t count_of_group(std::uint32_t counts, int g) {
    return counts >> g * kCountBits & kCountMask;
  }

  Candidates<Score, kThreads>& candidates_;
  std::uint32_t capacity_, k_;
};

template <typename Score, int kThreads, bool kInCluster>
__global__ void __launch_bounds__(kThreads, ctas_of_sm(kThreads))
    portable_topk_select_stream_kernel(const __grid_constant__ TopkTask task,
                                       std::uint32_t capacity) {
  using Stream = ScoreStream<Score, kThreads>;
  using Kept = Candidates<Score, kThreads>;
  using Own = RowPart<kInCluster>;
  extern __shared__ uint4 shared_bytes[];

  if constexpr (kInCluster) ptx::cluster_arrive_relaxed();
  const std::uint32_t k = task.k;
  const RowWindow window = window_of(task, Own::row());
  const auto size = static_cast<std::uint32_t>(window.size());
  if (size <= k) {
    write_short_row<Score, kThreads, Own>(task, window);
    if constexpr (kInCluster) ptx::cluster_wait();
    return;
  }

  const auto stream = [&](std::uint32_t part, std::uint32_t parts) {
    return Stream(task.row_scores<typename Score::Bits>(task.source_row(Own::row())),
                  window_of(task, Own::row()), part, parts);
  };
  Kept candidates(shared_bytes);
  TopkStream<Score, kThreads> topk(candidates, capacity, k);
  auto scores = stream(Own::part(), Own::parts());
  scores.prefetch(0);
  prefetch_pages(task, Own::row(), window, Own::part(), Own::parts());
  topk.guess(kInCluster ? stream(0, 1) : scores, size);
  if constexpr (kInCluster) {
    ptx::cluster_wait();  // all have begun
    std::uint32_t all;
    while (true) {
      topk.collect(scores);
      all = candidates.report();
      if (all >= k) break;
      ptx::cluster_sync();  // all have read the reports
      candidates.clear();   // the guess was too high
      scores = stream(Own::part(), Own::parts());
    }
    if (all > capacity) {
      if (candidates.count() > k) candidates.keep(k);
      ptx::cluster_sync();
      candidates.report();
    }
    if (Own::part() == 0) candidates.keep_of_cluster(k, capacity);
    ptx::cluster_arrive_relaxed();  // the first has read what it needs of the others
    ptx::cluster_wait();
    if (Own::part() != 0) return;
  } else {
    while (true) {
      topk.collect(scores);
      if (candidates.count() >= k) break;
      candidates.clear();
      scores = stream(0, 1);
    }
    if (candidates.count() > k) candidates.keep(k);
  }
  __syncthreads();
  write_columns<Score, kThreads>(task, Own::row(), 0, k, candidates.columns());
}

}  // namespace dsa::cuda::topk
