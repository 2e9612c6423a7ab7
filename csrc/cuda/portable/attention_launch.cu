// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd and flash_mla_with_kvcache on the portable attention kernel: params to
// AttentionArgs, the choice of an instance and of the number of splits.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numbers>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/attention_combine.cuh"
#include "cuda/portable/attention_config.cuh"
#include "cuda/portable/attention_kernel.cuh"

namespace dsa::cuda {

namespace {

constexpr std::int64_t kMaxKeys = std::int64_t{1} << 30;

struct Instance {
  LatentFormat format;
  int heads, tokens, ctas_per_sm;
  std::size_t shared_bytes;
  Status (*launch)(const AttentionArgs&, std::int64_t, const Launch&);
};

template <typename Config>
Status launch_attention(const AttentionArgs& args, std::int64_t rows, const Launch& where) {
  const std::int64_t head_tiles = ceil_div(args.num_heads, Config::kHeads);
  const dim3 grid(static_cast<unsigned>(rows * head_tiles), static_cast<unsigned>(args.num_splits));
  return launch<portable_attention_kernel<Config>>("portable_attention_kernel", where, grid,
                                                   Config::kThreads,
                                                   sizeof(typename Config::SharedStorage), args);
}

template <LatentFormat kFormat, int kHeads, int kTokens>
constexpr Instance instance() {
  using Config = AttentionConfig<kFormat, kHeads, kTokens>;
  return {kFormat,
          kHeads,
          kTokens,
          Config::kCtasPerSm,
          sizeof(typename Config::SharedStorage),
          launch_attention<Config>};
}

// The closed list: what is compiled, what is chosen from. Heads a tile, keys a tile. 64 heads need
// SM90's shared memory; 16 fit the 99 KiB of SM86, SM89 and SM12x.
constexpr Instance kInstances[] = {
    instance<LatentFormat::kBf16, 16, 32>(),   instance<LatentFormat::kBf16, 32, 32>(),
    instance<LatentFormat::kBf16, 64, 64>(),   instance<LatentFormat::kF16, 16, 32>(),
    instance<LatentFormat::kF16, 32, 32>(),    instance<LatentFormat::kF16, 64, 64>(),
    instance<LatentFormat::kMlaV32, 16, 32>(), instance<LatentFormat::kMlaV32, 32, 32>(),
    instance<LatentFormat::kMlaV32, 64, 64>(), instance<LatentFormat::kMlaV4, 16, 32>(),
    instance<LatentFormat::kMlaV4, 32, 32>(),  instance<LatentFormat::kMlaV4, 64, 64>(),
};

// Of those that fit the device, the smallest that has all heads in one tile, else the largest.
// nullptr: none fits.
const Instance* choose_instance(LatentFormat format, int num_heads, std::size_t shared_bytes) {
  const Instance* best = nullptr;
  for (const Instance& i : kInstances) {
    if (i.format != format || i.shared_bytes > shared_bytes) continue;
    if (best == nullptr || (best->heads < num_heads && i.heads > best->heads)) best = &i;
  }
  return best;
}

LatentFormat format_of(const TensorView& cache) {
  if (cache.dtype == DType::kBFloat16) return LatentFormat::kBf16;
  if (cache.dtype == DType::kFloat16) return LatentFormat::kF16;
  return cache.size(-1) == MlaV32Layout::kTokenBytes ? LatentFormat::kMlaV32 : LatentFormat::kMlaV4;
}

bool is_aligned(const void* data, std::initializer_list<std::int64_t> strides_in_bytes) {
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(data);
  for (const std::int64_t stride : strides_in_bytes) bits |= static_cast<std::uintptr_t>(stride);
  return bits % kChunk == 0;
}

LatentRows latent_rows(const TensorView& data, std::int64_t pages, std::int64_t page_size,
                       std::int64_t page_stride, std::int64_t token_stride) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;  // slots are int32
  LatentRows rows;
  rows.data = data.ptr<const std::uint8_t>();
  rows.num_pages = std::min(pages, kMost);
  rows.page_size = FastDivisor31(std::min(page_size, kMost));
  rows.num_slots = rows.num_pages * std::min(page_size, kMost);
  rows.page_stride = page_stride;
  rows.token_stride = token_stride;
  rows.aligned = is_aligned(data.data, {page_stride, token_stride});
  return rows;
}

LatentRows flat_rows(const TensorView& kv) {
  return latent_rows(kv, 1, kv.size(0), 0, kv.stride(0) * 2);
}

LatentRows paged_rows(const TensorView& cache) {
  const LatentFormat format = format_of(cache);
  const std::int64_t pages = cache.size(0), page_size = cache.size(1);
  if (format == LatentFormat::kBf16 || format == LatentFormat::kF16) {
    return latent_rows(cache, pages, page_size, cache.stride(0) * 2, cache.stride(1) * 2);
  }
  if (format == LatentFormat::kMlaV32) {
    LatentRows rows =
        latent_rows(cache, pages, page_size, cache.stride(0), MlaV32Layout::kTokenBytes);
    rows.scales_offset = MlaV32Layout::scales(0);
    rows.scales_stride = MlaV32Layout::kTokenBytes;
    return rows;
  }
  LatentRows rows = latent_rows(cache, pages, page_size, cache.stride(0), MlaV4Layout::kDataBytes);
  rows.scales_offset = MlaV4Layout{page_size}.scales(0);
  rows.scales_stride = MlaV4Layout::kScaleBytes;
  return rows;
}

SlotList slot_list(const LatentRows& rows, const TensorView& indices, const TensorView& length) {
  SlotList list;
  list.rows = rows;
  list.slots = indices.ptr<const std::int32_t>();
  list.stride_b = indices.stride(0);
  list.stride_j = indices.stride(1);
  list.count = static_cast<int>(indices.size(2));
  if (length.defined()) {
    list.length = length.ptr<const std::int32_t>();
    list.length_stride_b = length.stride(0);
    list.length_stride_j = length.ndim == 2 ? length.stride(1) : 0;
  }
  return list;
}

// What the two ops have in common. q and out: [.., heads, dim], their last three strides.
AttentionArgs common_args(const TensorView& q, const TensorView& out, const TensorView& sink,
                          double scale, std::int64_t d_v) {
  AttentionArgs a;
  a.q = q.ptr<const std::uint16_t>();
  a.q_stride_h = q.stride(-2);
  a.q_stride_b = q.stride(0);
  a.out = out.ptr<std::uint16_t>();
  a.out_stride_h = out.stride(-2);
  a.out_stride_b = out.stride(0);
  if (q.ndim == 4) {
    a.q_stride_j = q.stride(1);
    a.out_stride_j = out.stride(1);
    a.tokens_per_request = static_cast<int>(std::max<std::int64_t>(q.size(1), 1));
  }
  a.q_aligned = is_aligned(q.data, {a.q_stride_b * 2, a.q_stride_j * 2, a.q_stride_h * 2});
  a.out_aligned =
      is_aligned(out.data, {a.out_stride_b * 2, a.out_stride_j * 2, a.out_stride_h * 2});
  if (sink.defined()) {
    a.sink = sink.ptr<const float>();
    a.sink_stride = sink.stride(0);
  }
  a.scale_log2 = static_cast<float>(scale * std::numbers::log2e);
  a.num_heads = static_cast<int>(q.size(-2));
  a.d_qk = static_cast<int>(q.size(-1));
  a.d_v = static_cast<int>(d_v);
  return a;
}

Support takes(LatentFormat format, std::int64_t rows, std::int64_t heads, std::int64_t keys,
              const Launch& launch) {
  const DeviceLimits& limits = device_limits(launch.device);
  constexpr std::int64_t kFewestHeads = 16;  // a tile
  if (heads > kMaxGridX || rows > kMaxGridX / ceil_div(heads, kFewestHeads)) {
    return {"fewer query tokens times heads"};
  }
  if (keys > kMaxKeys) return {"at most 2^30 keys a row, not " + std::to_string(keys)};
  if (choose_instance(format, 1, limits.shared_bytes_per_cta) == nullptr) {
    return {"more shared memory than this device has"};
  }
  return {};
}

// ---- splits ---------------------------------------------------------------------------------

std::int64_t keys_of(const KvCacheFwdParams& p) {
  if (!p.indices.defined()) return p.block_table.size(1) * p.k_cache.size(1);
  return p.indices.size(2) + (p.extra_indices.defined() ? p.extra_indices.size(2) : 0);
}

struct SplitPlan {
  const Instance* instance;
  std::int64_t rows;             // query tokens
  std::int64_t rows_per_launch;  // so that the partial results fit the workspace
  int num_splits;

  std::int64_t partial_heads(std::int64_t num_heads) const {
    return num_splits > 1 ? rows_per_launch * num_splits * num_heads : 0;
  }
};

SplitPlan plan_splits(const KvCacheFwdParams& p) {
  const DeviceLimits& limits = device_limits(p.launch.device);
  const std::int64_t heads = p.q.size(2);
  const Instance* instance =
      choose_instance(format_of(p.k_cache), static_cast<int>(heads), limits.shared_bytes_per_cta);
  const std::int64_t rows = p.q.size(0) * p.q.size(1);
  const std::int64_t tiles = ceil_div<std::int64_t>(keys_of(p), instance->tokens);
  const std::int64_t most_splits = std::clamp<std::int64_t>(tiles, 1, 64);
  const std::int64_t bytes_per_split = heads * (p.head_dim_v + 1) * 4;  // of a row
  const auto affordable_rows = [&](std::int64_t splits) {
    return splits == 1 ? rows : std::min(rows, kMaxWorkspaceBytes / (splits * bytes_per_split));
  };

  if (p.batch_invariant) {
    // From the row's own shape alone: a split for every 1024 keys.
    const std::int64_t splits = std::clamp<std::int64_t>(
        ceil_div<std::int64_t>(tiles * instance->tokens, 1024), 1,
        std::min(most_splits, std::max<std::int64_t>(kMaxWorkspaceBytes / bytes_per_split, 1)));
    return {instance, rows, affordable_rows(splits), static_cast<int>(splits)};
  }
  // The fewest tile times until the last CTA is done: a CTA costs about two tiles beside its own.
  constexpr std::int64_t kCtaOverhead = 2;
  const std::int64_t ctas =
      std::max<std::int64_t>(rows, 1) * ceil_div<std::int64_t>(heads, instance->heads);
  constexpr std::size_t kReserved = 1024;  // of an SM's shared memory, for each CTA
  const std::size_t fit =
      (limits.shared_bytes_per_cta + kReserved) / (instance->shared_bytes + kReserved);
  const std::int64_t places =
      std::int64_t{limits.num_sms} *
      std::min<std::int64_t>(static_cast<std::int64_t>(fit), instance->ctas_per_sm);
  std::int64_t best = 1, best_cost = 0;
  for (std::int64_t splits = 1; splits <= most_splits; ++splits) {
    if (affordable_rows(splits) < rows) break;
    const std::int64_t cost =
        ceil_div(ctas * splits, places) * (ceil_div(tiles, splits) + kCtaOverhead);
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return {instance, rows, rows, static_cast<int>(best)};
}

}  // namespace

// ---- flash_mla_sparse_fwd ---------------------------------------------------------------------

Support sparse_fwd_takes(const SparseFwdParams& p) {
  const Support dims = mla_dims(p.q.size(2), p.d_v);
  return dims.ok() ? takes(format_of(p.kv), p.q.size(0), p.q.size(1), p.indices.size(2), p.launch)
                   : dims;
}

Status sparse_fwd(const SparseFwdParams& p) {
  AttentionArgs a = common_args(p.q, p.out, p.attn_sink, p.sm_scale, p.d_v);
  a.lse = p.lse.ptr<float>();
  a.lse_stride_b = p.lse.stride(0);
  a.lse_stride_h = p.lse.stride(1);
  a.max_logits = p.max_logits.ptr<float>();
  a.max_stride_b = p.max_logits.stride(0);
  a.max_stride_h = p.max_logits.stride(1);
  a.lists[0] = slot_list(flat_rows(p.kv), p.indices, p.topk_length);
  const Instance* instance = choose_instance(format_of(p.kv), a.num_heads,
                                             device_limits(p.launch.device).shared_bytes_per_cta);
  return instance->launch(a, p.q.size(0), p.launch);
}

// ---- flash_mla_with_kvcache -------------------------------------------------------------------

Support kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (p.is_fp8_kvcache && p.q.dtype != DType::kBFloat16) {
    return {"a bfloat16 q with an 8-bit cache"};
  }
  if (!p.is_fp8_kvcache) {
    const Support dims = mla_dims(p.q.size(3), p.head_dim_v);
    if (!dims.ok()) return dims;
  }
  return takes(format_of(p.k_cache), p.q.size(0) * p.q.size(1), p.q.size(2), keys_of(p), p.launch);
}

std::int64_t kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_splits(p).partial_heads(p.q.size(2)) * (p.head_dim_v + 1) * 4;
}

Status kvcache_fwd(const KvCacheFwdParams& p) {
  AttentionArgs a = common_args(p.q, p.out, p.attn_sink, p.softmax_scale, p.head_dim_v);
  a.lse = p.lse.ptr<float>();
  a.lse_stride_b = p.lse.stride(0);
  a.lse_stride_h = p.lse.stride(1);
  a.lse_stride_j = p.lse.stride(2);
  if (p.indices.defined()) {
    a.lists[0] = slot_list(paged_rows(p.k_cache), p.indices, p.topk_length);
    if (p.extra_k_cache.defined()) {
      a.lists[1] = slot_list(paged_rows(p.extra_k_cache), p.extra_indices, p.extra_topk_length);
    }
  } else {
    a.lists[0].rows = paged_rows(p.k_cache);
    a.block_table = p.block_table.ptr<const std::int32_t>();
    a.table_stride = p.block_table.stride(0);
    a.table_width = p.block_table.size(1);
    a.seqlens = p.cache_seqlens.ptr<const std::int32_t>();
    a.seqlens_stride = p.cache_seqlens.stride(0);
    a.causal = p.causal;
  }

  const SplitPlan plan = plan_splits(p);
  a.num_splits = plan.num_splits;
  if (plan.num_splits > 1) {
    a.partial_out = p.workspace.ptr<float>();
    a.partial_lse = a.partial_out + plan.partial_heads(a.num_heads) * a.d_v;
  }
  for (std::int64_t row = 0; row < plan.rows; row += plan.rows_per_launch) {
    const std::int64_t rows = std::min(plan.rows_per_launch, plan.rows - row);
    a.first_row = row;
    if (Status status = plan.instance->launch(a, rows, p.launch); !status.ok()) return status;
    if (plan.num_splits == 1) continue;
    const std::int64_t heads = rows * a.num_heads;
    const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(heads, kCombineWarps)));
    const Status status = p.q.dtype == DType::kBFloat16
                              ? launch<portable_attention_combine_kernel<__nv_bfloat16>>(
                                    "portable_attention_combine_kernel", p.launch, grid,
                                    32 * kCombineWarps, 0, a, heads)
                              : launch<portable_attention_combine_kernel<__half>>(
                                    "portable_attention_combine_kernel", p.launch, grid,
                                    32 * kCombineWarps, 0, a, heads);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace dsa::cuda
