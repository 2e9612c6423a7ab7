// SPDX-License-Identifier: Apache-2.0
// topk_select: exact top-k of each row's window, by radix selection (radix_select.cuh).
//
// tile       a CTA takes a row, and rows a grid apart; 512 threads, 16 scores each at a time.
// roles      all threads alike. A window of at most k columns is not read at all. Of a longer one
//            the digits of the threshold are counted (fp32: 11 + 11 + 10 bits, 16-bit scores: two
//            digits), the selected columns are written to `indices` in order, and at last turned in
//            place into indices or slots, which makes those steps dense.
// registers  64 at most: two CTAs an SM (kCtasOfSm).
// shared     SelectStorage (radix_select.cuh), 8 KiB.
// barriers   __syncthreads; between emission and the last step too, which reads other threads'
// work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/topk/output_row.cuh"
#include "cuda/topk/radix_select.cuh"
#include "cuda/topk/score_key.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

// The scores of a row's window. Contiguous ones are read 16 bytes at a time: groups begin at
// 16-byte boundaries, the first of them up to `lead` columns before the window.
template <typename Score, bool kContiguous>
class ScoreWindow {
 public:
  using Bits = typename Score::Bits;
  using Key = std::uint32_t;
  static constexpr int kKeyBits = Score::kKeyBits;
  static constexpr int kGroup = sizeof(uint4) / sizeof(Bits);
  static constexpr int kPerThread = 16;
  static constexpr int kGroups = kPerThread / kGroup;

  // `row` is column 0; begin <= end.
  __device__ ScoreWindow(const Bits* row, std::int64_t stride, int begin, int end)
      : row_(row), stride_(stride), begin_(begin), end_(end) {
    if constexpr (kContiguous) {
      const auto address = reinterpret_cast<std::uintptr_t>(row) + sizeof(Bits) * begin;
      lead_ = static_cast<int>(address % sizeof(uint4) / sizeof(Bits));
    }
  }

  __device__ int begin() const { return begin_; }
  __device__ int size() const { return end_ - begin_; }

  __device__ int num_chunks() const {
    return static_cast<int>(ceil_div<std::int64_t>(std::int64_t{size()} + lead_, kChunk));
  }

  __device__ std::int64_t column(int chunk, int group) const {
    return first_column(chunk) + chunk_offset<ScoreWindow>(group);
  }

  // All vectors are asked for before the first is used.
  __device__ void load(int chunk, Key (&keys)[kPerThread]) const {
    const Part part{at(first_column(chunk)), chunk == 0 ? lead_ : 0,
                    static_cast<int>(std::min<std::int64_t>(end_ - first_column(chunk), kChunk))};
    uint4 vectors[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int offset = chunk_offset<ScoreWindow>(g);
      vectors[g] = kContiguous && part.has_group(offset)
                       ? *reinterpret_cast<const uint4*>(part.first + offset)
                       : uint4{};
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int offset = chunk_offset<ScoreWindow>(g);
      Key* group_keys = keys + g * kGroup;
      if (kContiguous && part.has_group(offset)) {
        vector_keys(vectors[g], group_keys);
      } else {
        single_keys(part, offset, group_keys);
      }
    }
  }

 private:
  static constexpr int kChunk = kThreads * kPerThread;

  // A chunk; the offsets [lower, upper) from its first column are in the window.
  struct Part {
    const Bits* first;
    int lower;
    int upper;

    __device__ bool has(int offset) const { return offset >= lower && offset < upper; }
    __device__ bool has_group(int offset) const {
      return offset >= lower && offset + kGroup <= upper;
    }
  };

  __device__ std::int64_t first_column(int chunk) const {
    return std::int64_t{chunk} * kChunk + begin_ - lead_;
  }

  __device__ const Bits* at(std::int64_t column) const {
    return row_ + (kContiguous ? column : column * stride_);
  }

  static __device__ void vector_keys(const uint4& vector, Key* keys) {
    constexpr int kPerWord = sizeof(std::uint32_t) / sizeof(Bits);
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      keys[i] = score_key<Score>(static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 16)));
    }
  }

  __device__ void single_keys(const Part& part, int offset, Key* keys) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const std::int64_t distance = kContiguous ? offset + i : (offset + i) * stride_;
      keys[i] = part.has(offset + i) ? score_key<Score>(part.first[distance]) : 0u;
    }
  }

  const Bits* row_;
  std::int64_t stride_;
  int begin_;
  int end_;
  int lead_ = 0;
};

template <typename Window>
__device__ Window window_of(const TopkTask& task, std::int64_t row) {
  const RowWindow window(task, row);
  return Window(task.row_scores<typename Window::Bits>(row), task.column_stride, window.begin,
                window.end);
}

// Turns the selected columns in `indices` into what the caller asked for, in place, and pads the
// row. Of a window that is selected whole, nothing has been written yet. Asks for the window anew:
// held through the selection, it would cost registers.
template <typename Score>
__device__ void write_row(const TopkTask& task, std::int64_t row) {
  const RowWindow window(task, row);
  const OutputRow<Score> out(task, row);
  const bool whole = window.size() <= task.k;
  for (std::int64_t i = threadIdx.x; i < task.k; i += kThreads) {
    if (i < window.size()) {
      out.write(i, whole ? window.begin + i : out.indices()[i]);
    } else {
      out.pad(i);
    }
  }
}

// Code for GPUs before SM90 needs a few registers more than two CTAs leave it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kCtasOfSm = 1;
#else
inline constexpr int kCtasOfSm = 2;
#endif

template <typename Score, bool kContiguous>
__global__ void __launch_bounds__(kThreads, kCtasOfSm)
    portable_topk_select_kernel(const __grid_constant__ TopkTask task) {
  using Window = ScoreWindow<Score, kContiguous>;
  __shared__ SelectStorage shared;

  for (std::int64_t row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const auto window = window_of<Window>(task, row);
    if (window.size() > task.k) {
      const auto k = task.k;
      std::int32_t* columns = task.indices + row * task.indices_stride;
      const RadixThreshold<std::uint32_t> threshold = find_threshold(window, k, shared);
      emit_selected(window, threshold, k, shared,
                    [=](std::uint32_t rank, std::int64_t column, std::uint32_t) {
                      columns[rank] = static_cast<std::int32_t>(column);
                    });
      __syncthreads();
    }
    write_row<Score>(task, row);
  }
}

}  // namespace dsa::cuda::topk
