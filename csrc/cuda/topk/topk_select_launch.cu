// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/topk_select_kernel.cuh"

namespace dsa::cuda {
namespace {

template <typename Score>
Status launch_rows(const TopkSelectParams& params) {
  constexpr const char* kName = "portable_topk_select_kernel";
  const topk::TopkTask task(params);
  const dim3 grid(static_cast<unsigned>(std::min(params.scores.size(0), kMaxGridX)));
  return params.scores.stride(1) == 1 ? launch<topk::portable_topk_select_kernel<Score, true>>(
                                            kName, params.launch, grid, topk::kThreads, 0, task)
                                      : launch<topk::portable_topk_select_kernel<Score, false>>(
                                            kName, params.launch, grid, topk::kThreads, 0, task);
}

}  // namespace

Status topk_select(const TopkSelectParams& params) {
  return topk::with_score(params.scores.dtype,
                          [&](auto score) { return launch_rows<decltype(score)>(params); });
}

}  // namespace dsa::cuda
