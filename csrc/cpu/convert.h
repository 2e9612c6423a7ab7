// SPDX-License-Identifier: Apache-2.0
// Rows of f32, bf16 or f16 as fp32, and back (round to nearest even).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "dsa/params.h"

namespace dsa::cpu {

// The address of element `index` of an f32, bf16 or f16 array.
inline const void* element(const void* data, DType dtype, std::int64_t index) {
  return static_cast<const std::byte*>(data) + index * (dtype == DType::kFloat32 ? 4 : 2);
}
inline void* element(void* data, DType dtype, std::int64_t index) {
  return const_cast<void*>(element(static_cast<const void*>(data), dtype, index));
}

// dst[i] = src[i * stride], i < n; stride counts elements.
inline void load_as_float(const void* src, DType dtype, std::int64_t stride, std::int64_t n,
                          float* dst) {
  const auto load = [&](const auto* typed, auto&& convert) {
    if (stride == 1) {  // apart, so that it vectorises
      for (std::int64_t i = 0; i < n; ++i) dst[i] = convert(typed[i]);
    } else {
      for (std::int64_t i = 0; i < n; ++i) dst[i] = convert(typed[i * stride]);
    }
  };
  switch (dtype) {
    case DType::kBFloat16: return load(static_cast<const std::uint16_t*>(src), bf16_to_float);
    case DType::kFloat16: return load(static_cast<const std::uint16_t*>(src), f16_to_float);
    default: return load(static_cast<const float*>(src), [](float x) { return x; });
  }
}

inline void store_from_float(const float* src, std::int64_t n, DType dtype, void* dst) {
  const auto store = [&](auto* typed, auto&& convert) {
    for (std::int64_t i = 0; i < n; ++i) typed[i] = convert(src[i]);
  };
  switch (dtype) {
    case DType::kBFloat16: return store(static_cast<std::uint16_t*>(dst), bf16_from_float);
    case DType::kFloat16: return store(static_cast<std::uint16_t*>(dst), f16_from_float);
    default: return store(static_cast<float*>(dst), [](float x) { return x; });
  }
}

}  // namespace dsa::cpu
