// SPDX-License-Identifier: Apache-2.0
// Indexer logits with e4m3 products as the tensor cores of SM89 and SM12x have them.
#include <string>

#include "cuda/portable/mqa_logits_launch.cuh"

namespace dsa::cuda {

namespace {

constexpr const char* kNeedsE4m3 = "native e4m3 products: SM89 or newer";

__global__ void portable_mqa_e4m3_probe_kernel() {}

// SM89 also runs the SASS of SM80, which has no e4m3 products: what counts is what this build was
// compiled for.
template <typename Params>
Support takes(const Params& p) {
  const Support shapes = mqa_shapes(p, 89, kNeedsE4m3);
  if (!shapes.ok()) return shapes;
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, portable_mqa_e4m3_probe_kernel) != cudaSuccess) {
    cudaGetLastError();
    return {"a device whose kernels can be loaded"};
  }
  if (attributes.ptxVersion >= 89) return {};
  return {"a build for SM89 or newer (DSA_CUDA_ARCHS), not for SM" +
          std::to_string(attributes.ptxVersion)};
}

}  // namespace

Support mqa_logits_e4m3_takes(const MqaLogitsParams& p) { return takes(p); }

Support paged_mqa_logits_e4m3_takes(const PagedMqaLogitsParams& p) { return takes(p); }

Status mqa_logits_e4m3(const MqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_mqa_logits_e4m3");
}

Status paged_mqa_logits_e4m3(const PagedMqaLogitsParams& p) {
  return run_mqa_logits<E4m3Products>(p, "portable_paged_mqa_logits_e4m3");
}

}  // namespace dsa::cuda
