// SPDX-License-Identifier: Apache-2.0
// The public C++ API: one function an op. Each validates its arguments, chooses a kernel and runs
// it. Shapes stand in params.h; semantics in the Python docstrings of the same names.
#pragma once

#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa {

Status fp8_mqa_logits(const MqaLogitsParams& params);
Status fp8_paged_mqa_logits(const PagedMqaLogitsParams& params);
Status get_paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& params);
Status fp8_mqa_topk(const MqaTopkParams& params);
Status fp8_paged_mqa_topk(const PagedMqaTopkParams& params);

Status topk_select(const TopkSelectParams& params);
Status map_to_slots(const MapToSlotsParams& params);
Status merge_topk(const MergeTopkParams& params);

Status flash_mla_sparse_fwd(const SparseFwdParams& params);
Status flash_mla_with_kvcache(const KvCacheFwdParams& params);
Status merge_attn_states(const MergeAttnStatesParams& params);

Status hadamard_transform(const HadamardParams& params);
Status per_token_cast_to_fp8(const PerTokenCastParams& params);
Status indexer_k_quant_and_cache(const IndexerCacheWriteParams& params);
Status gather_indexer_k_cache(const IndexerCacheGatherParams& params);
Status mla_kv_quant_and_cache(const MlaCacheWriteParams& params);
Status gather_mla_kv_cache(const MlaCacheGatherParams& params);

}  // namespace dsa
