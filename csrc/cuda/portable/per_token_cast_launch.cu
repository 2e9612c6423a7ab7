// SPDX-License-Identifier: Apache-2.0
// per_token_cast_to_fp8. Tile: a group of 128 values, read once into the registers of a team of 8
// lanes, 16 values each; a cta takes 32 groups. No shared memory, no barriers.
#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/common/quantise.cuh"
#include "cuda/common/tensor_rows.cuh"
#include "cuda/cuda_kernels.h"

namespace dsa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 128;
constexpr int kTeam = kGroup / kLaneValues;
constexpr int kGroupsPerCta = kThreads / kTeam;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    portable_per_token_cast_kernel(TensorRows x, TensorRows out, TensorRows scales,
                                   FastDivisor groups_per_row, bool ue8m0, bool x_aligned,
                                   bool out_aligned) {
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  const std::int64_t group_of_all =
      std::int64_t{blockIdx.x} * kGroupsPerCta + static_cast<int>(threadIdx.x) / kTeam;
  const std::int64_t row = groups_per_row.quotient(group_of_all);
  const std::int64_t group = group_of_all - row * groups_per_row.divisor();
  const std::int64_t begin = group * kGroup + lane * kLaneValues;
  // Teams past the last row go on with nothing, since the warp's shuffles need all lanes.
  const bool any = row < x.count();
  const std::int64_t valid = any ? x.width() - begin : 0;

  float values[kLaneValues];
  load_as_float(x.row<const T>(any ? row : 0) + begin, valid, x_aligned, values);
  float scale = group_scale_of_team<kTeam>(values);
  if (ue8m0) scale = ue8m0_decode(ue8m0_encode(scale));
  const Pack<std::uint8_t, kLaneValues> codes = quantise(values, scale);
  if (!any) return;
  store(out.row<std::uint8_t>(row) + begin, codes, valid, out_aligned);
  if (lane == 0) scales.row<float>(row)[group] = scale;
}

}  // namespace

Status per_token_cast_to_fp8(const PerTokenCastParams& params) {
  const TensorRows x(params.x), out(params.out), scales(params.scale);
  const std::int64_t groups_per_row = ceil_div<std::int64_t>(x.width(), kGroup);
  const std::int64_t ctas = ceil_div<std::int64_t>(x.count() * groups_per_row, kGroupsPerCta);
  if (ctas > kMaxGridX) return Status::internal("portable_per_token_cast_kernel: too many groups");
  return with_value_type(params.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch<portable_per_token_cast_kernel<T>>(
        "portable_per_token_cast_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
        kThreads, 0, x, out, scales, FastDivisor(groups_per_row), params.use_ue8m0,
        rows_aligned(params.x, sizeof(T), kVectorBytes), rows_aligned(params.out, 1, kVectorBytes));
  });
}

}  // namespace dsa::cuda
