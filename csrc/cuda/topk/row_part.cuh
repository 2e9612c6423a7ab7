// SPDX-License-Identifier: Apache-2.0
// Which row of topk_select a CTA has, and which part of it; and rows from which nothing is selected.
#pragma once

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/topk/output_row.cuh"

namespace dsa::cuda::topk {

// A row a CTA, or a cluster. Asked for again rather than kept in registers.
template <bool kInCluster>
struct RowPart {
  static __device__ std::int64_t row() {
    if constexpr (kInCluster) return ptx::cluster_index();
    std::uint32_t row;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(row));
    return row;
  }
  static __device__ std::uint32_t part() { return kInCluster ? ptx::cluster_rank() : 0; }
  static __device__ std::uint32_t parts() { return kInCluster ? ptx::cluster_size() : 1; }
};

// Of up to k columns, by all that have a part of the row. A call, out of the way of a kernel's first
// run.
template <typename Score, typename Own>
__device__ __noinline__ void write_short_row(const TopkTask& task, RowWindow window) {
  const OutputRow<Score> out(task, Own::row());
  const auto size = static_cast<std::uint32_t>(window.size());
  for (std::uint32_t i = Own::part() * blockDim.x + threadIdx.x; i < task.k;
       i += Own::parts() * blockDim.x) {
    if (i < size) {
      out.write(i, window.begin + i);
    } else {
      out.pad(i);
    }
  }
}

}  // namespace dsa::cuda::topk
