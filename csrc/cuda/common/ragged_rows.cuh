// SPDX-License-Identifier: Apache-2.0
// Row of a packed (ragged) batch -> slot of a paged cache for the rows of a cta, with neither
// cu_seqlens nor the block table trusted: cpu/ragged_slots.h on a GPU.
#pragma once

#include <cstdint>

#include "core/page_table.h"
#include "cuda/common/fast_divisor.h"
#include "cuda/common/vector.cuh"
#include "dsa/params.h"

namespace dsa::cuda {

// A row belongs to the last request b with cu_seqlens[b] <= row, and to none unless row <
// cu_seqlens[b + 1].
struct RaggedRows {
  TensorView cu_seqlens;  // i32 [B + 1]
  PageTable table;
  FastDivisor page_size;

  RaggedRows(const TensorView& cu_seqlens, const TensorView& block_table,
             const TensorView& kv_cache)
      : cu_seqlens(cu_seqlens),
        table{block_table, kv_cache.size(1), kv_cache.size(0)},
        page_size(kv_cache.size(1)) {}

  __device__ std::int64_t begin(std::int64_t request) const {
    return cu_seqlens.ptr<const std::int32_t>()[request * cu_seqlens.stride(0)];
  }
};

// A token's place in a cache; page -1: none.
struct CachePlace {
  std::int64_t page;
  std::int64_t token;  // of the page
};

// places[i] becomes the place of row first_row + i, i < kRows. All kThreads of the cta call it;
// afterwards every thread may read `places`.
//
// last_request[i] is first the last request that begins at row i of the cta, for i = 0 at it or
// before; its running maximum is then the last that begins at or before a row. Integer maxima: the
// order of the atomics does not matter.
template <int kRows, int kThreads>
__device__ void find_places(const RaggedRows& rows, std::int64_t first_row,
                            CachePlace (&places)[kRows]) {
  static_assert(kRows % kWarpSize == 0 && kRows <= kThreads);
  __shared__ int last_request[kRows];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kRows) last_request[thread] = -1;
  __syncthreads();

  const std::int64_t num_requests = rows.cu_seqlens.size(0) - 1;
  int last_before = -1;
  for (std::int64_t request = thread; request < num_requests; request += kThreads) {
    const std::int64_t row = rows.begin(request) - first_row;
    if (row <= 0) last_before = static_cast<int>(request);
    if (row > 0 && row < kRows) atomicMax(&last_request[row], static_cast<int>(request));
  }
  last_before = __reduce_max_sync(kAllLanes, last_before);
  if (thread % kWarpSize == 0 && last_before >= 0) atomicMax(&last_request[0], last_before);
  __syncthreads();

  if (thread < kRows) {  // whole warps
    const int lane = thread % kWarpSize;
    int request = last_request[thread];
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int earlier = __shfl_up_sync(kAllLanes, request, distance);
      if (lane >= distance) request = max(request, earlier);
    }
    for (int row = lane; row < thread - lane; row += kWarpSize) {
      request = max(request, __reduce_max_sync(kAllLanes, last_request[row]));
    }
    CachePlace place{-1, 0};
    const std::int64_t row = first_row + thread;
    if (request >= 0 && row < rows.begin(request + 1)) {
      const std::int64_t token = row - rows.begin(request);
      const std::int64_t index = rows.page_size.quotient(token);
      place = {rows.table.row(request).page(index), token - index * rows.page_size.divisor()};
    }
    places[thread] = place;
  }
  __syncthreads();
}

}  // namespace dsa::cuda
