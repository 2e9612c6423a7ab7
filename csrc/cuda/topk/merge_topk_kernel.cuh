// SPDX-License-Identifier: Apache-2.0
// merge_topk: the k best of each row of (score, index) candidates, by radix selection
// (radix_select.cuh) and a sort of what is kept.
//
// tile       a CTA takes a row, and rows a grid apart; 512 threads, 4 candidates each at a time.
// roles      all threads alike. Selection goes by one key, (score, lower index first), with ties to
//            the lower position; the kept candidates are collected in shared memory as (index,
//            position) and sorted there by a bitonic network.
// registers  64 at most: two CTAs an SM.
// shared     SelectStorage (radix_select.cuh), 8 KiB; dynamic: 8 bytes a kept candidate, rounded
//            up to a power of two of them, 64 KiB at most.
// barriers   __syncthreads: after collecting, and after each step of the network.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

#include "cuda/common/launch.h"
#include "cuda/topk/radix_select.cuh"
#include "cuda/topk/score_key.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

inline constexpr std::int64_t kMaxMerged = 8192;

// A row of candidates; a negative index is none.
template <typename Score>
class CandidateRow {
 public:
  using Bits = typename Score::Bits;
  using Key = std::uint64_t;
  static constexpr int kIndexBits = 31;
  static constexpr int kKeyBits = Score::kKeyBits + kIndexBits;
  static constexpr int kGroup = 1;
  static constexpr int kPerThread = 4;
  static constexpr int kGroups = kPerThread / kGroup;

  __device__ CandidateRow(const MergeTopkParams& params, std::int64_t row)
      : count_(params.scores.size(1)),
        score_stride_(params.scores.stride(1)),
        index_stride_(params.indices.stride(1)),
        scores_(params.scores.ptr<const Bits>() + row * params.scores.stride(0)),
        indices_(params.indices.ptr<const std::int32_t>() + row * params.indices.stride(0)) {}

  __device__ int num_chunks() const {
    return static_cast<int>(ceil_div<std::int64_t>(count_, kChunk));
  }

  __device__ std::int64_t column(int chunk, int group) const {
    return std::int64_t{chunk} * kChunk + chunk_offset<CandidateRow>(group);
  }

  __device__ void load(int chunk, Key (&keys)[kPerThread]) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const std::int64_t position = column(chunk, g);
      const bool inside = position < count_;
      const std::int32_t index = inside ? indices_[position * index_stride_] : -1;
      const Bits bits = inside ? scores_[position * score_stride_] : Bits{0};
      keys[g] = index < 0 ? 0 : Key{score_key<Score>(bits)} << kIndexBits | (kMaxIndex - index);
    }
  }

  static __device__ Key index_of(Key key) { return kMaxIndex - key % (Key{1} << kIndexBits); }

  __device__ float score(std::int64_t position) const {
    return Score::to_float(scores_[position * score_stride_]);
  }

 private:
  static constexpr int kChunk = kThreads * kPerThread;
  static constexpr Key kMaxIndex = (Key{1} << kIndexBits) - 1;

  std::int64_t count_;
  std::int64_t score_stride_;
  std::int64_t index_stride_;
  const Bits* scores_;
  const std::int32_t* indices_;
};

// Sorts items [0, size) in ascending order; size is a power of two. Ends with a barrier.
__device__ inline void bitonic_sort(std::uint64_t* items, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int low = 2 * pair - (pair & (distance - 1));
        const int high = low + distance;
        const bool ascending = (low & run) == 0;
        const std::uint64_t a = items[low];
        const std::uint64_t b = items[high];
        if ((a > b) == ascending) {
          items[low] = b;
          items[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

template <typename Score>
__global__ void __launch_bounds__(kThreads, 2)
    portable_merge_topk_kernel(const __grid_constant__ MergeTopkParams params) {
  using Row = CandidateRow<Score>;
  __shared__ SelectStorage shared;
  extern __shared__ std::uint64_t items[];  // index, position in the lower half

  const auto k = static_cast<std::uint32_t>(params.topk);
  for (std::int64_t row = blockIdx.x; row < params.scores.size(0); row += gridDim.x) {
    const Row candidates(params, row);
    const RadixThreshold<typename Row::Key> threshold = find_threshold(candidates, k, shared);
    const auto kept = static_cast<int>(emit_selected(
        candidates, threshold, k, shared,
        [=](std::uint32_t rank, std::int64_t position, typename Row::Key key) {
          items[rank] = Row::index_of(key) << 32 | static_cast<std::uint64_t>(position);
        }));
    const int size = kept > 1 ? 1 << (32 - __clz(kept - 1)) : kept;
    for (int i = kept + threadIdx.x; i < size; i += kThreads) items[i] = ~std::uint64_t{0};
    __syncthreads();
    bitonic_sort(items, size);

    std::int32_t* out = params.out_indices.ptr<std::int32_t>() + row * params.out_indices.stride(0);
    float* out_scores = params.out_scores.defined()
                            ? params.out_scores.ptr<float>() + row * params.out_scores.stride(0)
                            : nullptr;
    for (std::int64_t i = threadIdx.x; i < params.topk; i += kThreads) {
      const bool is_candidate = i < kept;
      const std::uint64_t item = is_candidate ? items[i] : 0;
      out[i] = is_candidate ? static_cast<std::int32_t>(item >> 32) : -1;
      if (out_scores == nullptr) continue;
      out_scores[i] = is_candidate ? candidates.score(static_cast<std::uint32_t>(item))
                                   : -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace dsa::cuda::topk
