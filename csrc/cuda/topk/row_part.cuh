// SPDX-License-Identifier: Apache-2.0
// Which row of topk_select a CTA has, and which part of it; and rows from which nothing is
// selected.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/common/launch.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/topk/output_row.cuh"

namespace dsa::cuda::topk {

// 1024 threads an SM, with 64 registers each; the least that a GPU lets an SM have is 16 CTAs.
constexpr int ctas_of_sm(int threads) { return std::min(1024 / threads, 16); }

// A row a CTA, or a cluster. Asked for again rather than kept in registers.
template <bool kInCluster>
struct RowPart {
  static __device__ std::int64_t row() { return kInCluster ? ptx::cluster_index() : ptx::cta_x(); }
  static __device__ std::uint32_t part() { return kInCluster ? ptx::cluster_rank() : 0; }
  static __device__ std::uint32_t parts() { return kInCluster ? ptx::cluster_size() : 1; }
};

// A row of up to k columns, all of which are selected, by all that have a part of it.
template <typename Score, int kThreads, typename Own>
__device__ void write_short_row(const TopkTask& task, const RowWindow& window) {
  const auto size = static_cast<std::uint32_t>(window.size());
  const std::uint32_t each = ceil_div(size, Own::parts());
  const std::uint32_t first = std::min(Own::part() * each, size);
  write_columns<Score, kThreads>(task, Own::row(), first, std::min(each, size - first),
                                 ColumnRange{window.begin + first});
  if (Own::part() != 0) return;
  std::int32_t* const indices = task.indices + Own::row() * task.indices_stride;
  for (std::uint32_t i = size + threadIdx.x; i < task.k; i += kThreads) {
    indices[i] = static_cast<std::int32_t>(kInvalidSlot);
  }
  if (task.out_scores == nullptr) return;
  float* const scores = task.out_scores + Own::row() * task.out_scores_stride;
  for (std::uint32_t i = size + threadIdx.x; i < task.k; i += kThreads) {
    scores[i] = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace dsa::cuda::topk
