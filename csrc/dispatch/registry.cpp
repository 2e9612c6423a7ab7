// SPDX-License-Identifier: Apache-2.0
#include "dispatch/registry.h"

#include "cpu/cpu_kernels.h"
#include "dispatch/check.h"
#include "dispatch/heuristics.h"
#if DSA_WITH_CUDA
#include "cuda/common/device_info.h"
#include "cuda/cuda_kernels.h"
#endif

namespace dsa {

namespace {

#if DSA_WITH_CUDA
constexpr const char* kNoCudaKernels = "";
#else
constexpr const char* kNoCudaKernels = " (built without CUDA)";
#endif

}  // namespace

Support runs_on(const Target& target, Device device) {
  if (target.type == device.type) return target.supports(device);
  return {"takes " + std::string(target.type == DeviceType::kCpu ? "cpu" : "cuda") +
          " tensors, not " + device_name(device) +
          (device.type == DeviceType::kCuda ? kNoCudaKernels : "")};
}

namespace {

// Any arguments, or any device.
template <typename T>
Support any(const T&) {
  return {};
}

template <typename Params>
Support index_head_dim(const Params& p) {
  const std::int64_t d = p.q.size(-1);
  if (d == 32 || d == 64 || d == 128) return {};
  return {"index_head_dim 32, 64 or 128, not " + std::to_string(d)};
}

}  // namespace

Support mla_dims(std::int64_t d_qk, std::int64_t d_v) {
  if (d_v % 64 != 0 || d_v > 512) {
    return {"d_v a multiple of 64 up to 512, not " + std::to_string(d_v)};
  }
  const std::int64_t d_rope = d_qk - d_v;
  if (d_rope == 0 || d_rope == 32 || d_rope == 64) return {};
  return {"d_qk - d_v 0, 32 or 64, not " + std::to_string(d_rope)};
}

namespace {

// An 8-bit cache fixes its own dimensions (validate.cpp).
Support sparse_fwd_dims(const SparseFwdParams& p) {
  return p.is_fp8() ? Support{} : mla_dims(p.q.size(-1), p.d_v);
}

Support kvcache_dims(const KvCacheFwdParams& p) {
  return p.is_fp8_kvcache ? Support{} : mla_dims(p.q.size(-1), p.head_dim_v);
}

constexpr const char* kIndexCpu = "any H, D 32, 64 or 128";
constexpr const char* kPrefill =
    "any heads and top-k; d_v 64..512, d_rope 0, 32 or 64; 656-byte and 584-byte caches";
constexpr const char* kSelection = "any k and row length; fp32, bf16, fp16";
constexpr const char* kDecodeCpu = "dense and sparse; 16-bit, 656-byte and 584-byte caches";
constexpr const char* kHadamard = "sizes 1 to 32768";
constexpr const char* kMlaCaches = "16-bit, 656-byte and 584-byte caches";
constexpr Target kCpu = {DeviceType::kCpu, any};
#if DSA_WITH_CUDA
// What every CUDA kernel needs.
Support sm80(const Device& device) {
  if (cuda::device_limits(device).arch >= 80) return {};
  return {cuda::arch_refusal("SM80 or newer", device)};
}

constexpr Target kSm80 = {DeviceType::kCuda, sm80};
constexpr Target kE4m3 = {DeviceType::kCuda, cuda::e4m3_products_run_on};
constexpr const char* kIndexCuda = "H 1..128, D 32, 64 or 128";
constexpr const char* kIndexE4m3 = "SM89 and newer; H 1..128, D 32, 64 or 128";
constexpr const char* kSelectionResident =
    "k up to 8192; rows of contiguous fp32, bf16, fp16 that registers hold: 16384 columns, of few "
    "rows more";
constexpr const char* kSelectionSplit =
    "k up to 8192; few rows of more than 524288 contiguous fp32, bf16, fp16";
constexpr const char* kSelectionStream = "k up to 8192; rows of contiguous fp32, bf16, fp16";
constexpr const char* kMqaTopkCuda = "H 1..128, D 32, 64 or 128; up to 2^24 keys";
constexpr const char* kPagedMqaTopkCuda =
    "H 1..128, D 32, 64 or 128; next_n * (keys + 4) up to 2^24";
constexpr const char* kPrefillCuda =
    "any heads and top-k; d_v 64..512, d_rope 0, 32 or 64; 656-byte and 584-byte caches with bf16 "
    "q";
constexpr const char* kDecodeCuda =
    "dense and sparse; 16-bit, 656-byte and 584-byte caches; bf16 q for 8-bit ones";
#endif
#if DSA_WITH_SM90A
// What Hopper's own instructions need.
Support sm90a(const Device& device) {
  if (cuda::device_limits(device).arch == 90) return {};
  return {cuda::arch_refusal("SM90", device)};
}

constexpr Target kSm90a = {DeviceType::kCuda, sm90a};
constexpr const char* kIndexSm90a = "SM90; H 1..128, D 32, 64 or 128; q and k on 16 bytes";
constexpr const char* kPagedIndexSm90a =
    "SM90; H 1..128, D 128; pages of 8 keys or a multiple; q and pages on 16 bytes";
constexpr const char* kDecodeSm90a = "SM90; dense and sparse; 8-bit caches on 16 bytes; bf16 q";
constexpr const char* kLatentDecodeSm90a =
    "SM90; dense and sparse; 16-bit caches on 16 bytes; d_v 512 of d_qk 512 or 576";
constexpr const char* kPrefillSm90a = "SM90; 16-bit rows on 16 bytes; d_v 512 of d_qk 512 or 576";
constexpr const char* kFp8PrefillSm90a = "SM90; 8-bit caches on 16 bytes; bf16 q";
#endif

}  // namespace

// DSA_KERNELS(params, entry, ...): the kernels of an op, best first. An entry of DSA_CUDA is there
// in a build with CUDA only.
#define DSA_KERNELS(PARAMS, ...)                             \
  template <>                                                \
  std::span<const Kernel<PARAMS>> kernels<PARAMS>() {        \
    static constexpr Kernel<PARAMS> table[] = {__VA_ARGS__}; \
    return table;                                            \
  }
#if DSA_WITH_CUDA
#define DSA_CUDA(...) {__VA_ARGS__},
#else
#define DSA_CUDA(...)
#endif
#if DSA_WITH_SM90A
#define DSA_SM90A(...) {__VA_ARGS__},
#else
#define DSA_SM90A(...)
#endif

DSA_KERNELS(MqaLogitsParams,
            DSA_SM90A("sm90a_mqa_logits", kSm90a, kIndexSm90a, cuda::sm90a_mqa_logits_takes,
                      cuda::sm90a_mqa_logits)
                DSA_CUDA("portable_mqa_logits_e4m3", kE4m3, kIndexE4m3, cuda::mqa_logits_takes,
                         cuda::mqa_logits_e4m3, nullptr, e4m3_products_are_widened)
                    DSA_CUDA("portable_mqa_logits", kSm80, kIndexCuda, cuda::mqa_logits_takes,
                             cuda::mqa_logits){"cpu_mqa_logits", kCpu, kIndexCpu, index_head_dim,
                                               cpu::mqa_logits})

DSA_KERNELS(PagedMqaLogitsParams,
            DSA_SM90A("sm90a_paged_mqa_logits", kSm90a, kPagedIndexSm90a,
                      cuda::sm90a_paged_mqa_logits_takes, cuda::sm90a_paged_mqa_logits)
                DSA_CUDA("portable_paged_mqa_logits_e4m3", kE4m3, kIndexE4m3,
                         cuda::paged_mqa_logits_takes, cuda::paged_mqa_logits_e4m3, nullptr,
                         e4m3_products_are_widened)
                    DSA_CUDA("portable_paged_mqa_logits", kSm80, kIndexCuda,
                             cuda::paged_mqa_logits_takes,
                             cuda::paged_mqa_logits){"cpu_paged_mqa_logits", kCpu, kIndexCpu,
                                                     index_head_dim, cpu::paged_mqa_logits})

DSA_KERNELS(PagedMqaLogitsMetadataParams,
            DSA_CUDA("portable_paged_mqa_logits_metadata", kSm80, "any", any,
                     cuda::paged_mqa_logits_metadata){"cpu_paged_mqa_logits_metadata", kCpu, "any",
                                                      any, cpu::paged_mqa_logits_metadata})

DSA_KERNELS(MqaTopkParams, DSA_CUDA("portable_mqa_topk", kSm80, kMqaTopkCuda, cuda::mqa_topk_takes,
                                    cuda::mqa_topk, cuda::mqa_topk_workspace_bytes){
                               "cpu_mqa_topk", kCpu, kIndexCpu, index_head_dim, cpu::mqa_topk})

DSA_KERNELS(PagedMqaTopkParams,
            DSA_CUDA("portable_paged_mqa_topk", kSm80, kPagedMqaTopkCuda,
                     cuda::paged_mqa_topk_takes, cuda::paged_mqa_topk,
                     cuda::paged_mqa_topk_workspace_bytes){"cpu_paged_mqa_topk", kCpu, kIndexCpu,
                                                           index_head_dim, cpu::paged_mqa_topk})

DSA_KERNELS(TopkSelectParams,
            DSA_CUDA("portable_topk_select_resident", kSm80, kSelectionResident,
                     cuda::topk_select_resident_takes, cuda::topk_select_resident)
                DSA_CUDA("portable_topk_select_split", kSm80, kSelectionSplit,
                         cuda::topk_select_split_takes, cuda::topk_select_split,
                         cuda::topk_select_split_workspace_bytes)
                    DSA_CUDA("portable_topk_select_stream", kSm80, kSelectionStream,
                             cuda::topk_select_stream_takes, cuda::topk_select_stream)
                        DSA_CUDA("portable_topk_select", kSm80, kSelection, any, cuda::topk_select){
                            "cpu_topk_select", kCpu, kSelection, any, cpu::topk_select})

DSA_KERNELS(MapToSlotsParams,
            DSA_CUDA("portable_map_to_slots", kSm80, "any", any, cuda::map_to_slots){
                "cpu_map_to_slots", kCpu, "any", any, cpu::map_to_slots})

DSA_KERNELS(MergeTopkParams,
            DSA_CUDA("portable_merge_topk", kSm80, "the smaller of k and row length up to 8192",
                     cuda::merge_topk_takes,
                     cuda::merge_topk){"cpu_merge_topk", kCpu, "any", any, cpu::merge_topk})

DSA_KERNELS(SparseFwdParams,
            DSA_SM90A("sm90a_sparse_fwd", kSm90a, kPrefillSm90a, cuda::sm90a_sparse_fwd_takes,
                      cuda::sm90a_sparse_fwd, cuda::sm90a_sparse_fwd_workspace_bytes)
                DSA_SM90A("sm90a_fp8_sparse_fwd", kSm90a, kFp8PrefillSm90a,
                          cuda::sm90a_fp8_sparse_fwd_takes, cuda::sm90a_fp8_sparse_fwd)
                    DSA_CUDA("portable_sparse_fwd", kSm80, kPrefillCuda, cuda::sparse_fwd_takes,
                             cuda::sparse_fwd){"cpu_sparse_fwd", kCpu, kPrefill, sparse_fwd_dims,
                                               cpu::sparse_fwd})

DSA_KERNELS(KvCacheFwdParams,
            DSA_SM90A("sm90a_kvcache_fwd", kSm90a, kDecodeSm90a, cuda::sm90a_kvcache_fwd_takes,
                      cuda::sm90a_kvcache_fwd, cuda::sm90a_kvcache_fwd_workspace_bytes)
                DSA_SM90A("sm90a_latent_kvcache_fwd", kSm90a, kLatentDecodeSm90a,
                          cuda::sm90a_latent_kvcache_fwd_takes, cuda::sm90a_latent_kvcache_fwd,
                          cuda::sm90a_latent_kvcache_fwd_workspace_bytes)
                    DSA_CUDA("portable_kvcache_fwd", kSm80, kDecodeCuda, cuda::kvcache_fwd_takes,
                             cuda::kvcache_fwd, cuda::kvcache_fwd_workspace_bytes){
                        "cpu_kvcache_fwd", kCpu, kDecodeCpu, kvcache_dims, cpu::kvcache_fwd})

DSA_KERNELS(MergeAttnStatesParams,
            DSA_CUDA("portable_merge_attn_states", kSm80, "any", any, cuda::merge_attn_states){
                "cpu_merge_attn_states", kCpu, "any", any, cpu::merge_attn_states})

DSA_KERNELS(HadamardParams,
            DSA_CUDA("portable_hadamard_transform", kSm80, kHadamard, any,
                     cuda::hadamard_transform){"cpu_hadamard_transform", kCpu, kHadamard, any,
                                               cpu::hadamard_transform})

DSA_KERNELS(PerTokenCastParams,
            DSA_CUDA("portable_per_token_cast_to_fp8", kSm80, "any", any,
                     cuda::per_token_cast_to_fp8){"cpu_per_token_cast_to_fp8", kCpu, "any", any,
                                                  cpu::per_token_cast_to_fp8})

DSA_KERNELS(IndexerCacheWriteParams,
            DSA_CUDA("portable_indexer_k_quant_and_cache", kSm80, "D up to 128", any,
                     cuda::indexer_cache_write){"cpu_indexer_k_quant_and_cache", kCpu,
                                                "D up to 128", any, cpu::indexer_cache_write})

DSA_KERNELS(IndexerCacheGatherParams,
            DSA_CUDA("portable_gather_indexer_k_cache", kSm80, "any", any,
                     cuda::indexer_cache_gather){"cpu_gather_indexer_k_cache", kCpu, "any", any,
                                                 cpu::indexer_cache_gather})

DSA_KERNELS(MlaCacheWriteParams,
            DSA_CUDA("portable_mla_kv_quant_and_cache", kSm80, kMlaCaches, any,
                     cuda::mla_cache_write){"cpu_mla_kv_quant_and_cache", kCpu, kMlaCaches, any,
                                            cpu::mla_cache_write})

DSA_KERNELS(MlaCacheGatherParams,
            DSA_CUDA("portable_gather_mla_kv_cache", kSm80, kMlaCaches, any,
                     cuda::mla_cache_gather){"cpu_gather_mla_kv_cache", kCpu, kMlaCaches, any,
                                             cpu::mla_cache_gather})

#undef DSA_KERNELS
#undef DSA_CUDA
#undef DSA_SM90A

namespace {

template <typename... Params>
std::vector<KernelInfo> list() {
  std::vector<KernelInfo> all;
  auto append = [&all]<typename P>() {
    for (const Kernel<P>& k : kernels<P>()) all.push_back({P::kOp, k.id, k.target, k.takes});
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
