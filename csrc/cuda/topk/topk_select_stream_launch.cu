// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/select_call.h"
#include "cuda/topk/topk_select_stream_kernel.cuh"

namespace dsa::cuda {
namespace {

constexpr std::int64_t kMostKept = 8192;
static_assert(topk::kMostCtas <= kMaxCluster);

constexpr std::int64_t chunk_of(int threads) {
  return std::int64_t{threads} * topk::scores_per_thread(threads);
}

std::int64_t capacity_of(const topk::SelectCall& call, int threads) {
  return std::min(call.task.k + chunk_of(threads), call.columns);
}

template <int kThreads>
std::size_t shared_bytes(const topk::SelectCall& call) {
  using Candidates = topk::Candidates<topk::F32Score, kThreads>;  // of any scores
  return sizeof(typename Candidates::Shared) +
         static_cast<std::size_t>(capacity_of(call, kThreads)) * sizeof(typename Candidates::Item);
}

// With 512 threads or more, whose chunks are alike.
bool large_fits(const topk::SelectCall& call) {
  static_assert(chunk_of(512) == chunk_of(1024));
  return shared_bytes<1024>(call) <= device_limits(call.launch.device).shared_bytes_per_cta;
}

constexpr const char* kName = "portable_topk_select_stream_kernel";

template <typename Score, int kThreads>
Status launch_ctas(const topk::SelectCall& call) {
  return launch<topk::portable_topk_select_stream_kernel<Score, kThreads, false>>(
      kName, call.launch, dim3(static_cast<unsigned>(call.rows)), kThreads,
      shared_bytes<kThreads>(call), call.task,
      static_cast<std::uint32_t>(capacity_of(call, kThreads)));
}

// A row is shared by as many CTAs as run at once on SMs of their own, each with a chunk of columns
// or more, since to meet costs about as much as to read one.
template <typename Score>
Status launch_clusters(const topk::SelectCall& call) {
  constexpr int kThreads = 1024;
  constexpr auto kKernel = topk::portable_topk_select_stream_kernel<Score, kThreads, true>;
  const auto rows = static_cast<unsigned>(call.rows);
  const DeviceLimits& limits = device_limits(call.launch.device);
  const std::int64_t most =
      std::min(call.columns / chunk_of(kThreads), call.rows > 0 ? limits.num_sms / call.rows : 0);
  for (int cluster = topk::has_clusters(limits) ? std::min<int>(most, topk::kMostCtas) : 1;
       cluster > 1; --cluster) {
    const ClusterLaunch shape{dim3(rows * cluster), cluster, kThreads,
                              shared_bytes<kThreads>(call)};
    if (clusters_at_once<kKernel>(kName, call.launch, shape) < call.rows) continue;
    return cuda::launch_clusters<kKernel>(kName, call.launch, shape, call.task,
                                          static_cast<std::uint32_t>(capacity_of(call, kThreads)));
  }
  return launch_ctas<Score, kThreads>(call);
}

// More threads where a long row has an SM to itself, and fewer where shared memory is short.
template <typename Score>
Status launch_rows(const topk::SelectCall& call) {
  if (!large_fits(call)) return launch_ctas<Score, 128>(call);
  return call.has_few_rows() && call.columns > chunk_of(512) ? launch_clusters<Score>(call)
                                                             : launch_ctas<Score, 512>(call);
}

}  // namespace

Support topk_select_stream_takes(const TopkSelectParams& p) {
  if (p.topk > kMostKept) return {"k up to 8192, not " + std::to_string(p.topk)};
  if (p.scores.size(0) > kMaxGridX) {
    return {"up to 2147483647 rows, not " + std::to_string(p.scores.size(0))};
  }
  if (p.scores.stride(1) != 1) return {"scores of a row one after another"};
  return {};
}

Status topk::select_stream(const SelectCall& call) {
  return topk::with_score(call.dtype,
                          [&](auto score) { return launch_rows<decltype(score)>(call); });
}

Status topk_select_stream(const TopkSelectParams& p) {
  return topk::select_stream(topk::SelectCall(p));
}

}  // namespace dsa::cuda
