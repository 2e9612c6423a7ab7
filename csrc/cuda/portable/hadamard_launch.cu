// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/hadamard_kernel.cuh"

namespace dsa::cuda {
namespace {

bool both_aligned(const HadamardParams& params, std::int64_t element_bytes, std::int64_t bytes) {
  return rows_aligned(params.x, element_bytes, bytes) &&
         rows_aligned(params.out, element_bytes, bytes);
}

template <typename T, int kValues>
Status launch_warp(const HadamardParams& params, float scale) {
  const TensorRows x(params.x), out(params.out);
  const std::int64_t lanes = std::max<std::int64_t>(x.width() / kValues, 1);
  const std::int64_t ctas = ceil_div<std::int64_t>(x.count(), kHadamardWarpThreads / lanes);
  if (ctas > kMaxGridX) return Status::internal("portable_hadamard_warp_kernel: too many rows");
  return launch<portable_hadamard_warp_kernel<T, kValues>>(
      "portable_hadamard_warp_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
      kHadamardWarpThreads, 0, x, out, scale, both_aligned(params, sizeof(T), kVectorBytes));
}

template <typename T, int kParts>
Status launch_cta(const HadamardParams& params, float scale) {
  const TensorRows x(params.x), out(params.out);
  if (x.count() > kMaxGridX) return Status::internal("portable_hadamard_cta_kernel: too many rows");
  const std::int64_t part = x.width() / kParts;
  int log2_part = 0;
  while (std::int64_t{1} << log2_part < part) ++log2_part;
  return launch<portable_hadamard_cta_kernel<T, kParts>>(
      "portable_hadamard_cta_kernel", params.launch, dim3(static_cast<unsigned>(x.count())),
      static_cast<int>(part / kCtaValues), hadamard_shared_bytes(part), x, out, log2_part, scale,
      both_aligned(params, sizeof(T), 2 * sizeof(T)));
}

}  // namespace

Status hadamard_transform(const HadamardParams& params) {
  const std::int64_t n = params.x.size(-1);
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  return with_value_type(params.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (n <= 256) return launch_warp<T, 8>(params, scale);
    if (n <= 512) return launch_warp<T, 16>(params, scale);
    return n <= kMaxPart ? launch_cta<T, 1>(params, scale) : launch_cta<T, 2>(params, scale);
  });
}

}  // namespace dsa::cuda
