// SPDX-License-Identifier: Apache-2.0
// Very long rows, fewer than would keep a GPU busy: pieces of them as if they were rows, each by as
// many CTAs as a cluster has, and then the k best of what was selected of each.
//
// Workspace: scores, fp32 [rows, pieces * k], and then columns, int32 [rows, pieces * k].
#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/topk/select_call.h"
#include "cuda/topk/topk_select_resident_kernel.cuh"

namespace dsa::cuda {
namespace {

constexpr std::int64_t kLongRow = std::int64_t{1} << 19;  // of more columns
constexpr std::int64_t kMostListed = 32768;               // places of a row's list
constexpr const char* kName = "portable_topk_select_listed_kernel";

// Of a row: clusters, or CTAs, for all SMs.
std::int64_t pieces_of(const TopkSelectParams& p) {
  const DeviceLimits& limits = device_limits(p.launch.device);
  const std::int64_t ctas = topk::has_clusters(limits) ? topk::kMostCtas : 1;
  return std::min(limits.num_sms / ctas / std::max<std::int64_t>(p.scores.size(0), 1),
                  kMostListed / p.topk);
}

std::int64_t num_listed(const TopkSelectParams& p) {
  return p.scores.size(0) * pieces_of(p) * p.topk;
}

template <typename Score, int kThreads, int kKeys>
Status launch_listed(const topk::SelectCall& call, const topk::PieceLists& lists) {
  using Topk = topk::ResidentTopk<topk::F32Score, kThreads, kKeys, false>;
  constexpr auto kKernel = topk::portable_topk_select_listed_kernel<Score, kThreads, kKeys>;
  return launch<kKernel>(kName, call.launch, dim3(static_cast<unsigned>(call.rows)), kThreads,
                         sizeof(typename Topk::Shared) + call.task.k * sizeof(std::uint32_t), lists,
                         call.task);
}

}  // namespace

Support topk_select_split_takes(const TopkSelectParams& p) {
  const Support rows = topk_select_stream_takes(p);
  if (!rows.ok()) return rows;
  if (p.scores.size(1) <= kLongRow) {
    return {"rows of more than " + std::to_string(kLongRow) + " columns"};
  }
  if (pieces_of(p) < 2) return {"few rows, not " + std::to_string(p.scores.size(0))};
  if (!p.workspace.defined() && p.launch.allocate == nullptr) return {"a workspace"};
  return {};
}

std::int64_t topk_select_split_workspace_bytes(const TopkSelectParams& p) {
  return num_listed(p) * static_cast<std::int64_t>(sizeof(float) + sizeof(std::int32_t));
}

Status topk_select_split(const TopkSelectParams& p) {
  const std::int64_t pieces = pieces_of(p);
  auto* const scores = p.workspace.ptr<float>();
  auto* const columns = reinterpret_cast<std::int32_t*>(scores + num_listed(p));

  const topk::SelectCall whole(p);
  topk::SelectCall each = whole;
  each.task.pieces = FastDivisor31(pieces);
  each.rows *= pieces;
  each.columns = std::max(ceil_div(p.scores.size(1), pieces), p.topk);
  each.reads_early = false;
  each.task.indices = columns;
  each.task.out_scores = scores;
  each.task.indices_stride = each.task.out_scores_stride = p.topk;
  each.task.bases = {};
  each.task.base = 0;
  each.task.as_slots = false;
  const Status status =
      topk::resident_takes(each) ? topk::select_resident(each) : topk::select_stream(each);
  if (!status.ok()) return status;

  return topk::with_score(whole.dtype, [&](auto score) {
    using Score = decltype(score);
    const topk::PieceLists lists{scores, columns, each.task.pieces};
    return pieces * p.topk <= kMostListed / 2 ? launch_listed<Score, 1024, 16>(whole, lists)
                                              : launch_listed<Score, 1024, 32>(whole, lists);
  });
}

}  // namespace dsa::cuda
