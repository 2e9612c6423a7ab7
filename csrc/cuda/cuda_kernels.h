// SPDX-License-Identifier: Apache-2.0
// The CUDA backend's kernels as dispatch/registry.cpp lists them: launchers, and where a kernel
// does not take all that is valid, what it takes. That the device will do has been asked before
// (registry.h). A launcher enqueues on params.launch.stream and returns.
#pragma once

#include <cstdint>

#include "dispatch/registry.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

// cuda/portable/mqa_logits_launch.cu: e4m3 widened to f16.
Support mqa_logits_takes(const MqaLogitsParams& params);
Status mqa_logits(const MqaLogitsParams& params);
Support paged_mqa_logits_takes(const PagedMqaLogitsParams& params);
Status paged_mqa_logits(const PagedMqaLogitsParams& params);
Status paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& params);

// cuda/portable/mqa_logits_e4m3_launch.cu: native e4m3 products, of the same arguments.
Support e4m3_products_run_on(const Device& device);
Status mqa_logits_e4m3(const MqaLogitsParams& params);
Status paged_mqa_logits_e4m3(const PagedMqaLogitsParams& params);

// cuda/sm90a/mqa_logits_launch.cu
Support sm90a_mqa_logits_takes(const MqaLogitsParams& params);
Status sm90a_mqa_logits(const MqaLogitsParams& params);
Support sm90a_paged_mqa_logits_takes(const PagedMqaLogitsParams& params);
Status sm90a_paged_mqa_logits(const PagedMqaLogitsParams& params);

// cuda/sm90a/kvcache_fwd_launch.cu
Support sm90a_fp8_sparse_fwd_takes(const SparseFwdParams& params);
Status sm90a_fp8_sparse_fwd(const SparseFwdParams& params);
Support sm90a_kvcache_fwd_takes(const KvCacheFwdParams& params);
Status sm90a_kvcache_fwd(const KvCacheFwdParams& params);
std::int64_t sm90a_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& params);

// cuda/sm90a/latent_fwd_launch.cu
Support sm90a_sparse_fwd_takes(const SparseFwdParams& params);
Status sm90a_sparse_fwd(const SparseFwdParams& params);
std::int64_t sm90a_sparse_fwd_workspace_bytes(const SparseFwdParams& params);
Support sm90a_latent_kvcache_fwd_takes(const KvCacheFwdParams& params);
Status sm90a_latent_kvcache_fwd(const KvCacheFwdParams& params);
std::int64_t sm90a_latent_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& params);

// cuda/portable/mqa_topk_launch.cu: logits of a chunk of rows into the workspace, then topk_select.
Support mqa_topk_takes(const MqaTopkParams& params);
Status mqa_topk(const MqaTopkParams& params);
std::int64_t mqa_topk_workspace_bytes(const MqaTopkParams& params);
Support paged_mqa_topk_takes(const PagedMqaTopkParams& params);
Status paged_mqa_topk(const PagedMqaTopkParams& params);
std::int64_t paged_mqa_topk_workspace_bytes(const PagedMqaTopkParams& params);

// cuda/topk
Support topk_select_resident_takes(const TopkSelectParams& params);
Status topk_select_resident(const TopkSelectParams& params);
Support topk_select_split_takes(const TopkSelectParams& params);
Status topk_select_split(const TopkSelectParams& params);
std::int64_t topk_select_split_workspace_bytes(const TopkSelectParams& params);
Support topk_select_stream_takes(const TopkSelectParams& params);
Status topk_select_stream(const TopkSelectParams& params);
Status topk_select(const TopkSelectParams& params);
Support merge_topk_takes(const MergeTopkParams& params);
Status merge_topk(const MergeTopkParams& params);

// cuda/portable/attention_launch.cu
Support sparse_fwd_takes(const SparseFwdParams& params);
Status sparse_fwd(const SparseFwdParams& params);
Support kvcache_fwd_takes(const KvCacheFwdParams& params);
Status kvcache_fwd(const KvCacheFwdParams& params);
std::int64_t kvcache_fwd_workspace_bytes(const KvCacheFwdParams& params);

// cuda/portable, one pass over memory each
Status merge_attn_states(const MergeAttnStatesParams& params);
Status map_to_slots(const MapToSlotsParams& params);
Status hadamard_transform(const HadamardParams& params);
Status per_token_cast_to_fp8(const PerTokenCastParams& params);
Status indexer_cache_write(const IndexerCacheWriteParams& params);
Status indexer_cache_gather(const IndexerCacheGatherParams& params);
Status mla_cache_write(const MlaCacheWriteParams& params);
Status mla_cache_gather(const MlaCacheGatherParams& params);

}  // namespace dsa::cuda
