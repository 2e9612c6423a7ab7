// SPDX-License-Identifier: Apache-2.0
// Argument checks, one overload an op. The only place that rejects a caller's arguments; what is
// valid but taken by no kernel is the registry's to say (registry.h). Values inside tensors are
// never read.
#pragma once

#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa {

Status validate(const MqaLogitsParams& p);
Status validate(const PagedMqaLogitsParams& p);
Status validate(const PagedMqaLogitsMetadataParams& p);
Status validate(const MqaTopkParams& p);
Status validate(const PagedMqaTopkParams& p);
Status validate(const TopkSelectParams& p);
Status validate(const MapToSlotsParams& p);
Status validate(const MergeTopkParams& p);
Status validate(const SparseFwdParams& p);
Status validate(const KvCacheFwdParams& p);
Status validate(const MergeAttnStatesParams& p);
Status validate(const HadamardParams& p);
Status validate(const PerTokenCastParams& p);
Status validate(const IndexerCacheWriteParams& p);
Status validate(const IndexerCacheGatherParams& p);
Status validate(const MlaCacheWriteParams& p);
Status validate(const MlaCacheGatherParams& p);

}  // namespace dsa
