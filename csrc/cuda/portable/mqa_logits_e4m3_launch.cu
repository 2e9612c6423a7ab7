// SPDX-License-Identifier: Apache-2.0
// Indexer logits with e4m3 products as the tensor cores of SM89 and SM12x have them.
#include "cuda/portable/mqa_logits_launch.cuh"

namespace dsa::cuda {

namespace {
constexpr const char* kNeedsE4m3 = "native e4m3 products: SM89 or newer";
}

Support mqa_logits_e4m3_takes(const MqaLogitsParams& p) { return mqa_shapes(p, 89, kNeedsE4m3); }

Support paged_mqa_logits_e4m3_takes(const PagedMqaLogitsParams& p) {
  return mqa_shapes(p, 89, kNeedsE4m3);
}

Status mqa_logits_e4m3(const MqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_mqa_logits_e4m3");
}

Status paged_mqa_logits_e4m3(const PagedMqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_paged_mqa_logits_e4m3");
}

}  // namespace dsa::cuda
