// SPDX-License-Identifier: Apache-2.0
// Indexer logits with e4m3 products as the tensor cores of SM89 and SM12x have them.
#include <string>

#include "cuda/portable/code_arch.h"
#include "cuda/portable/mqa_logits_launch.cuh"

namespace dsa::cuda {

// SM89 also runs the SASS of SM80, which has no e4m3 products: what counts beside the device is
// what this build was compiled for.
Support e4m3_products_run_on(const Device& device) {
  if (device_limits(device).arch < 89) return {arch_refusal("SM89 or newer", device)};
  const int code = code_arch(device);
  if (code >= 89) return {};
  if (code == 0) return {"a device whose kernels can be loaded"};
  return {"a build for SM89 or newer (DSA_CUDA_ARCHS), not for SM" + std::to_string(code)};
}

Status mqa_logits_e4m3(const MqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_mqa_logits_e4m3");
}

Status paged_mqa_logits_e4m3(const PagedMqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_paged_mqa_logits_e4m3");
}

}  // namespace dsa::cuda
