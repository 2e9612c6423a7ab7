// SPDX-License-Identifier: Apache-2.0
#include "dispatch/registry.h"

#include "cpu/cpu_kernels.h"

namespace dsa {

namespace {

template <typename Params>
Support any(const Params&) {
  return {};
}

template <typename Params>
Support index_head_dim(const Params& p) {
  const std::int64_t d = p.q.size(-1);
  if (d == 32 || d == 64 || d == 128) return {};
  return {"index_head_dim 32, 64 or 128, not " + std::to_string(d)};
}

Support mla_dims(std::int64_t d_qk, std::int64_t d_v) {
  if (d_v % 64 != 0 || d_v > 512) {
    return {"d_v a multiple of 64 up to 512, not " + std::to_string(d_v)};
  }
  const std::int64_t d_rope = d_qk - d_v;
  if (d_rope == 0 || d_rope == 32 || d_rope == 64) return {};
  return {"d_qk - d_v 0, 32 or 64, not " + std::to_string(d_rope)};
}

Support sparse_fwd_dims(const SparseFwdParams& p) { return mla_dims(p.q.size(-1), p.d_v); }

// An 8-bit cache fixes its own dimensions (validate.cpp).
Support kvcache_dims(const KvCacheFwdParams& p) {
  return p.is_fp8_kvcache ? Support{} : mla_dims(p.q.size(-1), p.head_dim_v);
}

constexpr const char* kIndexShapes = "any H, D 32, 64 or 128";
constexpr const char* kMlaShapes = "any heads and top-k; d_v 64..512, d_rope 0, 32 or 64";

}  // namespace

#define DSA_CPU_KERNEL(PARAMS, ID, TAKES, SUPPORTS, RUN)                                      \
  template <>                                                                                 \
  std::span<const Kernel<PARAMS>> kernels<PARAMS>() {                                         \
    static constexpr Kernel<PARAMS> table[] = {{ID, DeviceType::kCpu, TAKES, SUPPORTS, RUN}}; \
    return table;                                                                             \
  }

DSA_CPU_KERNEL(MqaLogitsParams, "cpu_mqa_logits", kIndexShapes, index_head_dim, cpu::mqa_logits)
DSA_CPU_KERNEL(PagedMqaLogitsParams, "cpu_paged_mqa_logits", kIndexShapes, index_head_dim,
               cpu::paged_mqa_logits)
DSA_CPU_KERNEL(PagedMqaLogitsMetadataParams, "cpu_paged_mqa_logits_metadata", "any", any,
               cpu::paged_mqa_logits_metadata)
DSA_CPU_KERNEL(MqaTopkParams, "cpu_mqa_topk", kIndexShapes, index_head_dim, cpu::mqa_topk)
DSA_CPU_KERNEL(PagedMqaTopkParams, "cpu_paged_mqa_topk", kIndexShapes, index_head_dim,
               cpu::paged_mqa_topk)
DSA_CPU_KERNEL(TopkSelectParams, "cpu_topk_select", "any k and row length; fp32, bf16, fp16", any,
               cpu::topk_select)
DSA_CPU_KERNEL(MapToSlotsParams, "cpu_map_to_slots", "any", any, cpu::map_to_slots)
DSA_CPU_KERNEL(MergeTopkParams, "cpu_merge_topk", "any", any, cpu::merge_topk)
DSA_CPU_KERNEL(SparseFwdParams, "cpu_sparse_fwd", kMlaShapes, sparse_fwd_dims, cpu::sparse_fwd)
DSA_CPU_KERNEL(KvCacheFwdParams, "cpu_kvcache_fwd",
               "dense and sparse; 16-bit, 656-byte and 584-byte caches", kvcache_dims,
               cpu::kvcache_fwd)
DSA_CPU_KERNEL(MergeAttnStatesParams, "cpu_merge_attn_states", "any", any, cpu::merge_attn_states)
DSA_CPU_KERNEL(HadamardParams, "cpu_hadamard_transform", "sizes 1 to 32768", any,
               cpu::hadamard_transform)
DSA_CPU_KERNEL(PerTokenCastParams, "cpu_per_token_cast_to_fp8", "any", any,
               cpu::per_token_cast_to_fp8)
DSA_CPU_KERNEL(IndexerCacheWriteParams, "cpu_indexer_k_quant_and_cache", "D up to 128", any,
               cpu::indexer_cache_write)
DSA_CPU_KERNEL(IndexerCacheGatherParams, "cpu_gather_indexer_k_cache", "any", any,
               cpu::indexer_cache_gather)
DSA_CPU_KERNEL(MlaCacheWriteParams, "cpu_mla_kv_quant_and_cache",
               "16-bit, 656-byte and 584-byte caches", any, cpu::mla_cache_write)
DSA_CPU_KERNEL(MlaCacheGatherParams, "cpu_gather_mla_kv_cache",
               "16-bit, 656-byte and 584-byte caches", any, cpu::mla_cache_gather)

#undef DSA_CPU_KERNEL

namespace {

template <typename... Params>
std::vector<KernelInfo> list() {
  std::vector<KernelInfo> all;
  auto append = [&all]<typename P>() {
    for (const Kernel<P>& k : kernels<P>()) all.push_back({P::kOp, k.id, k.device, k.takes});
  };
  (append.template operator()<Params>(), ...);
  return all;
}

}  // namespace

std::vector<KernelInfo> list_kernels() {
  return list<MqaLogitsParams, PagedMqaLogitsParams, PagedMqaLogitsMetadataParams, MqaTopkParams,
              PagedMqaTopkParams, TopkSelectParams, MapToSlotsParams, MergeTopkParams,
              SparseFwdParams, KvCacheFwdParams, MergeAttnStatesParams, HadamardParams,
              PerTokenCastParams, IndexerCacheWriteParams, IndexerCacheGatherParams,
              MlaCacheWriteParams, MlaCacheGatherParams>();
}

}  // namespace dsa
