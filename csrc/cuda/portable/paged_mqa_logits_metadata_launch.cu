// SPDX-License-Identifier: Apache-2.0
// The schedule of a paged batch: where each SM's run of 256-key segments begins.
//
// One CTA, and no memory but its own: one pass over the lengths for the total, a second one in
// tiles of a request a thread, whose prefix sums stand in shared memory. A thread owns the SMs tid,
// tid + 512, ...; their positions ascend, so each is found in the tile at hand or left for later.
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <cstdint>

#include "core/split_schedule.h"
#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"

namespace dsa::cuda {
namespace {

constexpr int kThreads = 512;

// Segments of the longest of a request's rows, all of which one pass over its keys serves.
__device__ std::int64_t segments_of(const TensorView& context_lens, std::int64_t request) {
  if (request >= context_lens.size(0)) return 0;
  const std::int32_t* lens =
      context_lens.ptr<const std::int32_t>() + request * context_lens.stride(0);
  if (context_lens.ndim == 1) return num_segments(*lens);
  std::int64_t longest = 0;
  for (std::int64_t j = 0; j < context_lens.size(1); ++j) {
    const std::int64_t length = lens[j * context_lens.stride(1)];
    longest = length > longest ? length : longest;
  }
  return num_segments(longest);
}

__global__ void __launch_bounds__(kThreads)
    portable_paged_mqa_logits_metadata_kernel(const TensorView context_lens,
                                              const std::int64_t num_sms, const TensorView out) {
  using Reduce = cub::BlockReduce<std::int64_t, kThreads>;
  using Scan = cub::BlockScan<std::int64_t, kThreads>;
  __shared__ union {
    typename Reduce::TempStorage reduce;
    typename Scan::TempStorage scan;
  } temp;
  __shared__ std::int64_t prefix[kThreads + 1];  // segments before each request of the tile
  __shared__ std::int64_t total;

  const std::int64_t num_requests = context_lens.size(0);
  std::int64_t mine = 0;
  for (std::int64_t request = threadIdx.x; request < num_requests; request += kThreads) {
    mine += segments_of(context_lens, request);
  }
  const std::int64_t sum = Reduce(temp.reduce).Sum(mine);
  if (threadIdx.x == 0) total = sum;

  const auto write = [&](std::int64_t sm, std::int64_t request, std::int64_t segment) {
    std::int32_t* row = out.ptr<std::int32_t>() + sm * out.stride(0);
    row[0] = static_cast<std::int32_t>(request);
    row[out.stride(1)] = static_cast<std::int32_t>(segment);
  };

  std::int64_t sm = threadIdx.x;
  std::int64_t before = 0;  // segments before the tile
  for (std::int64_t first = 0; first < num_requests; first += kThreads) {
    __syncthreads();  // orders the total, temp and the last tile's prefix
    std::int64_t exclusive, in_tile;
    Scan(temp.scan).ExclusiveSum(segments_of(context_lens, first + threadIdx.x), exclusive,
                                 in_tile);
    prefix[threadIdx.x] = before + exclusive;
    if (threadIdx.x == 0) prefix[kThreads] = before + in_tile;
    __syncthreads();
    before += in_tile;
    for (; sm <= num_sms; sm += kThreads) {
      const std::int64_t flat = flat_begin(sm, num_sms, total);
      if (flat >= before) break;
      const SegmentPosition begin = locate_segment(prefix, kThreads, flat);
      write(sm, first + begin.request, begin.segment);
    }
  }
  for (; sm <= num_sms; sm += kThreads) write(sm, num_requests, 0);
}

}  // namespace

Status paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& p) {
  return launch<portable_paged_mqa_logits_metadata_kernel>("portable_paged_mqa_logits_metadata",
                                                           p.launch, dim3(1), kThreads, 0,
                                                           p.context_lens, p.num_sms, p.out);
}

}  // namespace dsa::cuda
