// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/select_call.h"
#include "cuda/topk/topk_select_resident_kernel.cuh"

namespace dsa::cuda {
namespace {

constexpr const char* kName = "portable_topk_select_resident_kernel";
static_assert(topk::kMostCtas <= kMaxCluster);

// How a row stands in registers, of a CTA or of several.
template <typename Score, int kThreads, int kKeys, bool kInCluster>
struct Rows {
  static constexpr std::int64_t kColumns = std::int64_t{kThreads} * kKeys;  // of a CTA
  static constexpr auto kKernel =
      topk::portable_topk_select_resident_kernel<Score, kThreads, kKeys, kInCluster>;

  static ClusterLaunch shape(const topk::SelectCall& call, int ctas) {
    using Topk = topk::ResidentTopk<Score, kThreads, kKeys, kInCluster>;
    return {dim3(static_cast<unsigned>(call.rows * ctas)), ctas, kThreads,
            sizeof(typename Topk::Shared) +
                static_cast<std::size_t>(std::min(std::int64_t{call.task.k}, kColumns)) *
                    sizeof(std::uint32_t)};
  }
  static bool run_at_once(const topk::SelectCall& call, int ctas) {
    return clusters_at_once<kKernel>(kName, call.launch, shape(call, ctas)) >= call.rows;
  }
  static Status launch(const topk::SelectCall& call, int ctas) {
    const ClusterLaunch at = shape(call, ctas);
    const bool early = call.reads_early && call.has_few_rows();
    if constexpr (kInCluster) {
      return launch_clusters<kKernel>(kName, call.launch, at, early, call.task);
    } else {
      return cuda::launch<kKernel>(kName, call.launch, at.grid, kThreads, at.shared_bytes, early,
                                   call.task);
    }
  }
};

// use(Rows{}, CTAs a row), or otherwise(). A row is shared by as many CTAs as run at once, up to
// one for each kEach columns: with half as many each they are no faster. Rows that are few have
// more threads, with fewer keys each. A CTA alone has no more than 16384 columns: with 32 keys of
// each of 1024 threads, logits are selected from faster by candidates (docs/kernels/topk.md).
template <typename Score, typename Use, typename Otherwise>
auto with_rows(const topk::SelectCall& call, Use&& use, Otherwise&& otherwise) {
  constexpr std::int64_t kEach = 8192;
  const std::int64_t columns = call.columns;
  const bool few = call.has_few_rows();
  const DeviceLimits& limits = device_limits(call.launch.device);
  if (topk::has_clusters(limits) && few && call.rows > 0) {
    const std::int64_t most = std::min<std::int64_t>(
        {ceil_div(columns, kEach), limits.num_sms / call.rows, topk::kMostCtas});
    for (auto ctas = static_cast<int>(most); ctas > 1; --ctas) {
      const std::int64_t each = ceil_div<std::int64_t>(columns, ctas);
      const auto fits = [&](auto rows) {
        return each <= rows.kColumns && rows.run_at_once(call, ctas);
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
  } else {
    if (columns <= 4096) return use(Rows<Score, 128, 32, false>{}, 1);
    if (columns <= 8192) return use(Rows<Score, 256, 32, false>{}, 1);
    if (columns <= 16384) return use(Rows<Score, 512, 32, false>{}, 1);
  }
  return otherwise();
}

}  // namespace

bool topk::resident_takes(const SelectCall& call) {
  return topk::with_score(call.dtype, [&](auto score) {
    return with_rows<decltype(score)>(call, [](auto, int) { return true; }, [] { return false; });
  });
}

Status topk::select_resident(const SelectCall& call) {
  return topk::with_score(call.dtype, [&](auto score) {
    return with_rows<decltype(score)>(
        call, [&](auto rows, int ctas) { return rows.launch(call, ctas); },
        [] { return Status::internal("topk_select: rows that registers do not hold"); });
  });
}

Support topk_select_resident_takes(const TopkSelectParams& p) {
  const Support rows = topk_select_stream_takes(p);
  if (!rows.ok() || topk::resident_takes(topk::SelectCall(p))) return rows;
  return {"rows that registers hold, not of " + std::to_string(p.scores.size(1)) + " columns"};
}

Status topk_select_resident(const TopkSelectParams& p) {
  return topk::select_resident(topk::SelectCall(p));
}

}  // namespace dsa::cuda
