// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>

#include "core/quant_group.h"
#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

constexpr std::int64_t kGroup = 128;

}  // namespace

Status per_token_cast_to_fp8(const PerTokenCastParams& params) {
  const TensorRows x(params.x);
  const TensorRows codes(params.out);
  const TensorRows scales(params.scale);
  const auto cast_row = [&](std::int64_t row) {
    const void* values = element(params.x.data, params.x.dtype, x.offset(row));
    std::uint8_t* row_codes = codes.row<std::uint8_t>(row);
    float* row_scales = scales.row<float>(row);
    for (std::int64_t begin = 0; begin < x.width(); begin += kGroup) {
      float group[kGroup];
      const std::int64_t size = std::min(kGroup, x.width() - begin);
      load_as_float(element(values, params.x.dtype, begin), params.x.dtype, 1, size, group);
      row_scales[begin / kGroup] =
          params.use_ue8m0 ? ue8m0_decode(quantise_group_ue8m0(group, size, row_codes + begin))
                           : quantise_group(group, size, row_codes + begin);
    }
  };
  parallel_for(0, x.count(), row_grain(x.width()), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) cast_row(row);
  });
  return {};
}

}  // namespace dsa::cpu
