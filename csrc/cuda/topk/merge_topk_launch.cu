// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/merge_topk_kernel.cuh"

namespace dsa::cuda {
namespace {

// launch() opts in by the dynamic part alone: with all but the largest, the static part fits too.
static_assert(sizeof(topk::SelectStorage) + topk::kMaxMerged / 2 * sizeof(std::uint64_t) <=
              kDefaultSharedBytes);
static_assert(topk::kMaxMerged * sizeof(std::uint64_t) > kDefaultSharedBytes);

// The candidates of a row that shared memory must hold.
std::int64_t max_kept(const MergeTopkParams& params) {
  return std::min(params.topk, params.scores.size(1));
}

template <typename Score>
Status launch_rows(const MergeTopkParams& params) {
  const dim3 grid(static_cast<unsigned>(std::min(params.scores.size(0), kMaxGridX)));
  const std::size_t items_bytes =
      std::bit_ceil(static_cast<std::size_t>(max_kept(params))) * sizeof(std::uint64_t);
  return launch<topk::portable_merge_topk_kernel<Score>>(
      "portable_merge_topk_kernel", params.launch, grid, topk::kThreads, items_bytes, params);
}

}  // namespace

Support merge_topk_takes(const MergeTopkParams& params) {
  if (max_kept(params) <= topk::kMaxMerged) return {};
  return {"k up to " + std::to_string(topk::kMaxMerged) + ", not " + std::to_string(params.topk)};
}

Status merge_topk(const MergeTopkParams& params) {
  return topk::with_score(params.scores.dtype,
                          [&](auto score) { return launch_rows<decltype(score)>(params); });
}

}  // namespace dsa::cuda
