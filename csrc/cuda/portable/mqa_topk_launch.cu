// SPDX-License-Identifier: Apache-2.0
// Indexer scores straight to the k best keys: chunks of rows, each the logits kernel into the
// workspace and topk_select over the rows' windows there, so that the result is that of the two ops
// called one after the other. The number of launches depends on shapes alone.
//
// Workspace: fp32 scores of a chunk [rows, keys rounded up to 4], and for paged keys the rows'
// ends, int32 [rows]; kMaxWorkspaceBytes at most.
#include <algorithm>
#include <cstdint>
#include <string>

#include "core/page_table.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_mqa_task.h"
#include "cuda/cuda_kernels.h"
#include "dispatch/registry.h"

namespace dsa::cuda {
namespace {

Status select_rows(const TopkSelectParams& p) {
  if (topk_select_resident_takes(p).ok()) return topk_select_resident(p);
  return topk_select_stream_takes(p).ok() ? topk_select_stream(p) : topk_select(p);
}

constexpr int kThreads = 256;
constexpr std::int64_t kItemBytes = 4;  // of a score, and of a row's end
constexpr std::int64_t kMostItems = kMaxWorkspaceBytes / kItemBytes;

// How many groups of rows the workspace holds at a time.
struct Chunking {
  std::int64_t pitch;            // scores from a row to the next: whole 16-byte vectors
  std::int64_t items_per_group;  // scores and ends
  std::int64_t groups;           // of a chunk

  Chunking(std::int64_t num_groups, std::int64_t rows_per_group, std::int64_t keys,
           std::int64_t ends_per_row)
      : pitch(round_up<std::int64_t>(keys, 4)),
        items_per_group(rows_per_group * (pitch + ends_per_row)),
        groups(std::min(num_groups, kMostItems / std::max<std::int64_t>(items_per_group, 1))) {}

  std::int64_t bytes() const { return groups * items_per_group * kItemBytes; }
};

Chunking chunking(const MqaTopkParams& p) { return {p.q.size(0), 1, p.k.size(0), 0}; }

std::int64_t num_keys(const PagedMqaTopkParams& p) {
  return std::min(p.max_context_len, p.block_table.size(1) * p.kv_cache.size(1));
}

Chunking chunking(const PagedMqaTopkParams& p) {
  return {p.q.size(0), p.q.size(1), num_keys(p), 1};
}

std::int64_t item_bytes(DType dtype) { return dtype == DType::kFloat8E4M3 ? 1 : 4; }

// `count` entries of the first dimension; of no tensor, no tensor.
TensorView slice(TensorView view, std::int64_t first, std::int64_t count) {
  if (!view.defined()) return view;
  view.data = view.ptr<std::uint8_t>() + first * view.stride(0) * item_bytes(view.dtype);
  view.sizes[0] = count;
  return view;
}

TensorView scores_view(const TensorView& workspace, std::int64_t rows, std::int64_t keys,
                       std::int64_t pitch) {
  TensorView view;
  view.data = workspace.data;
  view.dtype = DType::kFloat32;
  view.device = workspace.device;
  view.ndim = 2;
  view.sizes[0] = rows;
  view.sizes[1] = keys;
  view.strides[0] = pitch;
  view.strides[1] = 1;
  return view;
}

TensorView ends_view(const TensorView& workspace, std::int64_t rows, std::int64_t first_item) {
  TensorView view;
  view.data = workspace.ptr<std::int32_t>() + first_item;
  view.dtype = DType::kInt32;
  view.device = workspace.device;
  view.ndim = 1;
  view.sizes[0] = rows;
  view.strides[0] = 1;
  return view;
}

// By the kernel that dispatch prefers, so that the fused ops equal the two steps.
template <typename Params>
Status logits(const Params& p) {
  for (const Kernel<Params>& kernel : kernels<Params>()) {
    const bool loses = kernel.loses != nullptr && kernel.loses(p);
    if (runs_on(kernel.target, p.launch.device).ok() && !loses && kernel.supports(p).ok()) {
      return kernel.run(p);
    }
  }
  return Status::internal(std::string(Params::kOp) + ": no kernel");
}

dim3 flat_grid(std::int64_t items) {
  constexpr std::int64_t kMostCtas = 1 << 16;
  return dim3(static_cast<unsigned>(std::min(ceil_div<std::int64_t>(items, kThreads), kMostCtas)));
}

// The end of each row's window.
__global__ void __launch_bounds__(kThreads)
    portable_paged_mqa_topk_ends_kernel(const PagedKeys keys, const TensorView ends) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; row < ends.size(0);
       row += step) {
    const KeyWindow window = keys.window(row / keys.next_n, row % keys.next_n);
    ends.ptr<std::int32_t>()[row] = static_cast<std::int32_t>(window.end);
  }
}

// Tokens -> slots, in place; -1 where there is no page.
__global__ void __launch_bounds__(kThreads)
    portable_paged_mqa_topk_slots_kernel(const TensorView indices, const PageTable table,
                                         const std::int64_t rows_per_request) {
  const std::int64_t topk = indices.size(1);
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < indices.numel();
       i += step) {
    const std::int64_t row = i / topk;
    std::int32_t& index = indices.ptr<std::int32_t>()[row * indices.stride(0) + i % topk];
    index = narrow_or_invalid(table.row(row / rows_per_request).slot(index));
  }
}

}  // namespace

Support mqa_topk_takes(const MqaTopkParams& p) {
  if (Support support = mqa_shapes(p); !support.ok()) return support;
  if (p.k.size(0) <= kMostItems) return {};
  return {"up to 16777216 keys, not " + std::to_string(p.k.size(0))};
}

std::int64_t mqa_topk_workspace_bytes(const MqaTopkParams& p) { return chunking(p).bytes(); }

Status mqa_topk(const MqaTopkParams& p) {
  const Chunking chunk = chunking(p);
  const std::int64_t num_rows = p.q.size(0);
  for (std::int64_t first = 0; first < num_rows; first += chunk.groups) {
    const std::int64_t rows = std::min(chunk.groups, num_rows - first);
    MqaLogitsParams step;
    step.q = slice(p.q, first, rows);
    step.k = p.k;
    step.k_scale = p.k_scale;
    step.weights = slice(p.weights, first, rows);
    step.k_start = slice(p.k_start, first, rows);
    step.k_end = slice(p.k_end, first, rows);
    step.clean_logits = false;
    step.out = scores_view(p.workspace, rows, p.k.size(0), chunk.pitch);
    step.launch = p.launch;
    if (Status status = logits(step); !status.ok()) return status;

    TopkSelectParams select;
    select.scores = step.out;
    select.topk = p.topk;
    select.row_starts = step.k_start;
    select.row_ends = step.k_end;
    select.indices = slice(p.indices, first, rows);
    select.out_scores = slice(p.scores, first, rows);
    select.launch = p.launch;
    if (Status status = select_rows(select); !status.ok()) return status;
  }
  return {};
}

Support paged_mqa_topk_takes(const PagedMqaTopkParams& p) {
  if (Support support = mqa_shapes(p); !support.ok()) return support;
  const std::int64_t next_n = p.q.size(1);
  // Checked by a division: the product may not fit.
  if (next_n == 0 || num_keys(p) + 4 <= kMostItems / next_n) return {};
  return {"next_n * (keys + 4) up to 16777216, not " + std::to_string(next_n) + " * (" +
          std::to_string(num_keys(p)) + " + 4)"};
}

std::int64_t paged_mqa_topk_workspace_bytes(const PagedMqaTopkParams& p) {
  return chunking(p).bytes();
}

Status paged_mqa_topk(const PagedMqaTopkParams& p) {
  const Chunking chunk = chunking(p);
  const std::int64_t num_requests = p.q.size(0), next_n = p.q.size(1);
  if (next_n == 0) return {};
  for (std::int64_t first = 0; first < num_requests; first += chunk.groups) {
    const std::int64_t requests = std::min(chunk.groups, num_requests - first);
    const std::int64_t first_row = first * next_n, rows = requests * next_n;
    PagedMqaLogitsParams step;
    step.q = slice(p.q, first, requests);
    step.kv_cache = p.kv_cache;
    step.weights = slice(p.weights, first_row, rows);
    step.context_lens = slice(p.context_lens, first, requests);
    step.block_table = slice(p.block_table, first, requests);
    step.max_context_len = num_keys(p);
    step.clean_logits = false;
    step.out = scores_view(p.workspace, rows, num_keys(p), chunk.pitch);
    step.launch = p.launch;
    if (Status status = logits(step); !status.ok()) return status;

    const TensorView ends = ends_view(p.workspace, rows, rows * chunk.pitch);
    if (Status status = launch<portable_paged_mqa_topk_ends_kernel>(
            "portable_paged_mqa_topk_ends", p.launch, flat_grid(rows), kThreads, 0,
            make_task(step).keys, ends);
        !status.ok()) {
      return status;
    }

    TopkSelectParams select;
    select.scores = step.out;
    select.topk = p.topk;
    select.row_ends = ends;
    select.indices = slice(p.indices, first_row, rows);
    select.out_scores = slice(p.scores, first_row, rows);
    select.launch = p.launch;
    if (Status status = select_rows(select); !status.ok()) return status;

    if (!p.return_slots) continue;
    const PageTable table = {step.block_table, p.kv_cache.size(1), p.kv_cache.size(0)};
    if (Status status = launch<portable_paged_mqa_topk_slots_kernel>(
            "portable_paged_mqa_topk_slots", p.launch, flat_grid(select.indices.numel()), kThreads,
            0, select.indices, table, next_n);
        !status.ok()) {
      return status;
    }
  }
  return {};
}

}  // namespace dsa::cuda
