// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/topk_select_resident_kernel.cuh"

namespace dsa::cuda {
namespace {

constexpr const char* kName = "portable_topk_select_resident_kernel";
static_assert(topk::kMostCtas <= kMaxCluster);

// Each has an SM.
bool are_few(const TopkSelectParams& p) {
  return p.scores.size(0) <= device_limits(p.launch.device).num_sms;
}

// How a row stands in registers, of a CTA or of several.
template <typename Score, int kThreads, int kKeys, bool kInCluster>
struct Rows {
  static constexpr std::int64_t kColumns = std::int64_t{kThreads} * kKeys;  // of a CTA
  static constexpr auto kKernel =
      topk::portable_topk_select_resident_kernel<Score, kThreads, kKeys, kInCluster>;

  static ClusterLaunch shape(const TopkSelectParams& p, int ctas) {
    using Topk = topk::ResidentTopk<Score, kThreads, kKeys, kInCluster>;
    return {dim3(static_cast<unsigned>(p.scores.size(0) * ctas)), ctas, kThreads,
            sizeof(typename Topk::Shared) +
                static_cast<std::size_t>(std::min(p.topk, kColumns)) * sizeof(std::uint32_t)};
  }
  static bool run_at_once(const TopkSelectParams& p, int ctas) {
    return clusters_at_once<kKernel>(kName, p.launch, shape(p, ctas)) >= p.scores.size(0);
  }
  static Status launch(const TopkSelectParams& p, int ctas) {
    const ClusterLaunch at = shape(p, ctas);
    const topk::TopkTask task(p);
    if constexpr (kInCluster) return launch_clusters<kKernel>(kName, p.launch, at, true, task);
    return cuda::launch<kKernel>(kName, p.launch, at.grid, kThreads, at.shared_bytes,
                                 are_few(p), task);
  }
};

// use(Rows{}, CTAs a row) for rows of `p`, or otherwise. A row is shared by as many CTAs as run at
// once on SMs of their own, each with kLeast columns or more, since to meet costs about as much as
// to read so many. Rows that are few have more threads, with fewer keys each.
template <typename Score, typename Use, typename Otherwise>
auto with_rows(const TopkSelectParams& p, Use&& use, Otherwise&& otherwise) {
  constexpr std::int64_t kLeast = 8192;
  const std::int64_t columns = p.scores.size(1);
  const bool few = are_few(p);
  const DeviceLimits& limits = device_limits(p.launch.device);
  const bool has_clusters = limits.arch >= 90 && limits.arch < 120;  // of more than one CTA
  if (has_clusters && few && p.scores.size(0) > 0) {
    const std::int64_t most = std::min<std::int64_t>(
        {columns / kLeast, limits.num_sms / p.scores.size(0), topk::kMostCtas});
    for (auto ctas = static_cast<int>(most); ctas > 1; --ctas) {
      const std::int64_t each = ceil_div<std::int64_t>(columns, ctas);
      const auto fits = [&](auto rows) {
        return each <= rows.kColumns && rows.run_at_once(p, ctas);
      };
      if (fits(Rows<Score, 512, 16, true>{})) return use(Rows<Score, 512, 16, true>{}, ctas);
      if (fits(Rows<Score, 1024, 16, true>{})) return use(Rows<Score, 1024, 16, true>{}, ctas);
      if (fits(Rows<Score, 1024, 32, true>{})) return use(Rows<Score, 1024, 32, true>{}, ctas);
    }
  }
  if (columns <= 512) return use(Rows<Score, 32, 16, false>{}, 1);
  if (columns <= 2048) return use(Rows<Score, 128, 16, false>{}, 1);
  if (few) {
    if (columns <= 4096) return use(Rows<Score, 256, 16, false>{}, 1);
    if (columns <= 8192) return use(Rows<Score, 512, 16, false>{}, 1);
    if (columns <= 16384) return use(Rows<Score, 1024, 16, false>{}, 1);
    if (columns <= 32768) return use(Rows<Score, 1024, 32, false>{}, 1);
  } else {
    if (columns <= 4096) return use(Rows<Score, 128, 32, false>{}, 1);
    if (columns <= 8192) return use(Rows<Score, 256, 32, false>{}, 1);
    if (columns <= 16384) return use(Rows<Score, 512, 32, false>{}, 1);
  }
  return otherwise();
}

template <typename Use>
auto with_score(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::kBFloat16: return use(topk::Bf16Score{});
    case DType::kFloat16: return use(topk::F16Score{});
    default: return use(topk::F32Score{});
  }
}

}  // namespace

Support topk_select_resident_takes(const TopkSelectParams& p) {
  const Support rows = topk_select_stream_takes(p);
  if (!rows.ok()) return rows;
  const bool fits = with_score(p.scores.dtype, [&](auto score) {
    return with_rows<decltype(score)>(
        p, [](auto, int) { return true; }, [] { return false; });
  });
  if (fits) return {};
  return {"rows that registers hold, not of " + std::to_string(p.scores.size(1)) + " columns"};
}

Status topk_select_resident(const TopkSelectParams& p) {
  return with_score(p.scores.dtype, [&](auto score) {
    return with_rows<decltype(score)>(
        p, [&](auto rows, int ctas) { return rows.launch(p, ctas); },
        [] { return Status::internal("topk_select: rows that registers do not hold"); });
  });
}

}  // namespace dsa::cuda
