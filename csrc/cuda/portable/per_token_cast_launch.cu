// SPDX-License-Identifier: Apache-2.0
// per_token_cast_to_fp8. Tile: a group of 128 values, read once into the registers of a team of 8
// lanes, 16 values each. A team takes kGroupsPerTeam groups, whose loads are in flight together.
// No shared memory, no barriers.
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
constexpr int kTeams = kThreads / kTeam;

// Two groups at once where they fit into the registers of a thread.
template <typename T>
constexpr int kGroupsPerTeam = sizeof(T) == 2 ? 2 : 1;

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    portable_per_token_cast_kernel(TensorRows x, TensorRows out, TensorRows scales,
                                   FastDivisor groups_per_row, bool ue8m0) {
  constexpr int kGroups = kGroupsPerTeam<T>;
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  const std::int64_t first =
      std::int64_t{blockIdx.x} * (kGroups * kTeams) + static_cast<int>(threadIdx.x) / kTeam;
  std::int64_t row[kGroups] = {}, group[kGroups] = {}, valid[kGroups] = {};
  const T* src[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    row[i] = groups_per_row.quotient(first + i * kTeams);
    group[i] = first + i * kTeams - row[i] * groups_per_row.divisor();
    // Teams past the last row go on with nothing, since the warp's shuffles need all lanes.
    const bool any = row[i] < x.count();
    const std::int64_t begin = group[i] * kGroup + lane * kLaneValues;
    src[i] = x.row<const T>(any ? row[i] : 0) + begin;
    valid[i] = any ? x.width() - begin : 0;
  }
  Pack<T, kLaneValues> values[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) values[i] = load<kWhole, T, kLaneValues>(src[i], valid[i]);
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    float scale = group_scale_of_team<kTeam>(values[i]);
    if (ue8m0) scale = ue8m0_decode(ue8m0_encode(scale));
    const Pack<std::uint8_t, kLaneValues> codes = quantise(values[i], scale);
    if (row[i] >= x.count()) continue;
    store<kWhole>(out.row<std::uint8_t>(row[i]) + group[i] * kGroup + lane * kLaneValues, codes,
                  valid[i]);
    if (lane == 0) scales.row<float>(row[i])[group[i]] = scale;
  }
}

}  // namespace

Status per_token_cast_to_fp8(const PerTokenCastParams& params) {
  const TensorRows x(params.x), out(params.out), scales(params.scale);
  const std::int64_t groups_per_row = ceil_div<std::int64_t>(x.width(), kGroup);
  return with_value_type(params.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t ctas =
        ceil_div<std::int64_t>(x.count() * groups_per_row, kTeams * kGroupsPerTeam<T>);
    if (ctas > kMaxGridX) {
      return Status::internal("portable_per_token_cast_kernel: too many groups");
    }
    const bool whole = x.width() % kLaneValues == 0 &&
                       rows_aligned(params.x, sizeof(T), kVectorBytes) &&
                       rows_aligned(params.out, 1, kVectorBytes);
    return with_flag(whole, [&](auto flag) {
      return launch<portable_per_token_cast_kernel<T, decltype(flag)::value>>(
          "portable_per_token_cast_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
          kThreads, 0, x, out, scales, FastDivisor(groups_per_row), params.use_ue8m0);
    });
  });
}

}  // namespace dsa::cuda
