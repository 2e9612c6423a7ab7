// SPDX-License-Identifier: Apache-2.0
// The CPU backend: one function an op, called with validated params (dispatch/registry.cpp).
#pragma once

#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cpu {

Status mqa_logits(const MqaLogitsParams& params);
Status paged_mqa_logits(const PagedMqaLogitsParams& params);
Status paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& params);
Status mqa_topk(const MqaTopkParams& params);
Status paged_mqa_topk(const PagedMqaTopkParams& params);
Status topk_select(const TopkSelectParams& params);
Status map_to_slots(const MapToSlotsParams& params);
Status merge_topk(const MergeTopkParams& params);
Status sparse_fwd(const SparseFwdParams& params);
Status kvcache_fwd(const KvCacheFwdParams& params);
Status merge_attn_states(const MergeAttnStatesParams& params);
Status hadamard_transform(const HadamardParams& params);
Status per_token_cast_to_fp8(const PerTokenCastParams& params);
Status indexer_cache_write(const IndexerCacheWriteParams& params);
Status indexer_cache_gather(const IndexerCacheGatherParams& params);
Status mla_cache_write(const MlaCacheWriteParams& params);
Status mla_cache_gather(const MlaCacheGatherParams& params);

}  // namespace dsa::cpu
