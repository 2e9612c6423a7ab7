// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include "core/fp8.h"

namespace dsa::cuda::ptx {

inline std::uint32_t f16x2_from_e4m3x2(std::uint16_t codes) {
  const auto half = [&](int shift) {
    const float value = e4m3_decode(static_cast<std::uint8_t>(codes >> shift));
    return std::uint32_t{__half_as_ushort(__float2half_rn(value))};
  };
  return half(0) | half(8) << 16;
}
inline uint2 f16x4_from_e4m3x4(std::uint32_t codes) {
  return {f16x2_from_e4m3x2(static_cast<std::uint16_t>(codes)),
          f16x2_from_e4m3x2(static_cast<std::uint16_t>(codes >> 16))};
}

}  // namespace dsa::cuda::ptx
