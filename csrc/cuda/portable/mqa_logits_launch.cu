// SPDX-License-Identifier: Apache-2.0
// Indexer logits with e4m3 widened to f16.
#include "cuda/portable/mqa_logits_launch.cuh"

namespace dsa::cuda {

Support mqa_logits_takes(const MqaLogitsParams& p) { return mqa_shapes(p); }

Support paged_mqa_logits_takes(const PagedMqaLogitsParams& p) { return mqa_shapes(p); }

Status mqa_logits(const MqaLogitsParams& p) {
  return run_mqa_logits<WidenedProducts>(p, "portable_mqa_logits");
}

Status paged_mqa_logits(const PagedMqaLogitsParams& p) {
  return run_mqa_logits<WidenedProducts>(p, "portable_paged_mqa_logits");
}

}  // namespace dsa::cuda
