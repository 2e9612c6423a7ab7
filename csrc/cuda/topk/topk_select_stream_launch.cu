// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/topk_select_stream_kernel.cuh"

namespace dsa::cuda {
namespace {

constexpr std::int64_t kMostKept = 8192;
static_assert(topk::kMostCtas <= kMaxCluster);

constexpr std::int64_t chunk_of(int threads) {
  return std::int64_t{threads} * topk::scores_per_thread(threads);
}

std::int64_t capacity_of(const TopkSelectParams& p, int threads) {
  return std::min(p.topk + chunk_of(threads), p.scores.size(1));
}

template <int kThreads>
std::size_t shared_bytes(const TopkSelectParams& p) {
  using Candidates = topk::Candidates<topk::F32Score, kThreads>;  // of any scores
  return sizeof(typename Candidates::Shared) +
         static_cast<std::size_t>(capacity_of(p, kThreads)) * sizeof(typename Candidates::Item);
}

// With 512 threads or more, whose chunks are alike.
bool large_fits(const TopkSelectParams& p) {
  static_assert(chunk_of(512) == chunk_of(1024));
  return shared_bytes<1024>(p) <= device_limits(p.launch.device).shared_bytes_per_cta;
}

constexpr const char* kName = "portable_topk_select_stream_kernel";

template <typename Score, int kThreads>
Status launch_ctas(const TopkSelectParams& p) {
  return launch<topk::portable_topk_select_stream_kernel<Score, kThreads, false>>(
      kName, p.launch, dim3(static_cast<unsigned>(p.scores.size(0))), kThreads,
      shared_bytes<kThreads>(p), topk::TopkTask(p),
      static_cast<std::uint32_t>(capacity_of(p, kThreads)));
}

// A row is shared by as many CTAs as run at once on SMs of their own, each with a chunk of columns
// or more, since to meet costs about as much as to read one.
template <typename Score>
Status launch_clusters(const TopkSelectParams& p) {
  constexpr int kThreads = 1024;
  constexpr auto kKernel = topk::portable_topk_select_stream_kernel<Score, kThreads, true>;
  const auto rows = static_cast<unsigned>(p.scores.size(0));
  const DeviceLimits& limits = device_limits(p.launch.device);
  const bool has_clusters = limits.arch >= 90 && limits.arch < 120;  // of more than one CTA
  const std::int64_t most = std::min(p.scores.size(1) / chunk_of(kThreads),
                                     p.scores.size(0) > 0 ? limits.num_sms / p.scores.size(0) : 0);
  for (int cluster = has_clusters ? std::min<int>(most, topk::kMostCtas) : 1; cluster > 1;
       --cluster) {
    const ClusterLaunch shape{dim3(rows * cluster), cluster, kThreads, shared_bytes<kThreads>(p)};
    if (clusters_at_once<kKernel>(kName, p.launch, shape) < p.scores.size(0)) continue;
    return cuda::launch_clusters<kKernel>(kName, p.launch, shape, topk::TopkTask(p),
                                          static_cast<std::uint32_t>(capacity_of(p, kThreads)));
  }
  return launch_ctas<Score, kThreads>(p);
}

// As many threads as a row keeps busy, and more where a long row has an SM to itself.
template <typename Score>
Status launch_rows(const TopkSelectParams& p) {
  if (p.scores.size(1) <= chunk_of(32)) return launch_ctas<Score, 32>(p);
  if (p.scores.size(1) <= chunk_of(128) || !large_fits(p)) return launch_ctas<Score, 128>(p);
  if (p.scores.size(0) > device_limits(p.launch.device).num_sms) return launch_ctas<Score, 512>(p);
  return p.scores.size(1) <= chunk_of(512) ? launch_ctas<Score, 512>(p) : launch_clusters<Score>(p);
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

Status topk_select_stream(const TopkSelectParams& p) {
  switch (p.scores.dtype) {
    case DType::kBFloat16: return launch_rows<topk::Bf16Score>(p);
    case DType::kFloat16: return launch_rows<topk::F16Score>(p);
    default: return launch_rows<topk::F32Score>(p);
  }
}

}  // namespace dsa::cuda
