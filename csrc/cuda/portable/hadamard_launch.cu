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

int log2_of(std::int64_t power) {
  int log2 = 0;
  while (std::int64_t{1} << log2 < power) ++log2;
  return log2;
}

// 2^log2_units units a lane.
template <typename T, int kLog2Units>
Status launch_warp(const HadamardParams& params, float scale) {
  const TensorRows x(params.x), out(params.out);
  constexpr int kLog2Values = kLog2Unit<T> + kLog2Units;
  const int log2_lanes = std::max(log2_of(x.width()) - kLog2Values, 0);
  const std::int64_t ctas = ceil_div<std::int64_t>(x.count(), kHadamardWarpThreads >> log2_lanes);
  if (ctas > kMaxGridX) return Status::internal("portable_hadamard_warp_kernel: too many rows");
  const bool whole =
      x.width() >= std::int64_t{1} << kLog2Values && both_aligned(params, sizeof(T), kVectorBytes);
  return with_flag(whole, [&](auto flag) {
    return launch<portable_hadamard_warp_kernel<T, kLog2Units, decltype(flag)::value>>(
        "portable_hadamard_warp_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
        kHadamardWarpThreads, 0, x, out, log2_lanes, scale);
  });
}

template <typename T, int kParts>
Status launch_cta(const HadamardParams& params, float scale) {
  const TensorRows x(params.x), out(params.out);
  if (x.count() > kMaxGridX) return Status::internal("portable_hadamard_cta_kernel: too many rows");
  const std::int64_t part = x.width() / kParts;
  return with_flag(both_aligned(params, sizeof(T), 2 * sizeof(T)), [&](auto flag) {
    return launch<portable_hadamard_cta_kernel<T, kParts, decltype(flag)::value>>(
        "portable_hadamard_cta_kernel", params.launch, dim3(static_cast<unsigned>(x.count())),
        static_cast<int>(part / kCtaValues), hadamard_shared_bytes(part), x, out, log2_of(part),
        scale);
  });
}

}  // namespace

Status hadamard_transform(const HadamardParams& params) {
  const std::int64_t n = params.x.size(-1);
  const double orthonormal = 1.0 / std::sqrt(static_cast<double>(n));
  const auto scale = static_cast<float>(params.scale.value_or(orthonormal));
  return with_value_type(params.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (n < 1 << kLog2WarpValues) return launch_warp<T, 0>(params, scale);
    if (n <= kWarpSize << kLog2WarpValues) {
      return launch_warp<T, kLog2WarpValues - kLog2Unit<T>>(params, scale);
    }
    return n <= kMaxPart ? launch_cta<T, 1>(params, scale) : launch_cta<T, 2>(params, scale);
  });
}

}  // namespace dsa::cuda
