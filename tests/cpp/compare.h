// SPDX-License-Identifier: Apache-2.0
// Elements of host tensors, and what of an op's output must agree with another backend's.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/fp8.h"
#include "core/half.h"
#include "cpu_test_data.h"
#include "dsa/params.h"

namespace dsa::test {

inline std::int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kInt64: return 8;
    default: return 1;
  }
}

// Bytes from the first element of a tensor to the end of its last (strides are not negative).
inline std::size_t extent_bytes(const TensorView& t) {
  if (t.numel() == 0) return 0;
  std::int64_t last = 0;
  for (int dim = 0; dim < t.ndim; ++dim) last += (t.sizes[dim] - 1) * t.strides[dim];
  return static_cast<std::size_t>((last + 1) * element_size(t.dtype));
}

// Calls visit(byte offset) for each element, in row-major order.
template <typename Visit>
void for_each_element(const TensorView& t, Visit&& visit) {
  const std::int64_t count = t.numel();
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t rest = i, offset = 0;
    for (int dim = t.ndim - 1; dim >= 0; --dim) {
      offset += rest % t.sizes[dim] * t.strides[dim];
      rest /= t.sizes[dim];
    }
    visit(static_cast<std::size_t>(offset * element_size(t.dtype)));
  }
}

inline float load_float(const std::uint8_t* at, DType dtype) {
  if (dtype == DType::kFloat8E4M3) return e4m3_decode(*at);
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  std::uint16_t code;
  std::memcpy(&code, at, sizeof(code));
  return half_to_float(code, dtype);
}

// How an output is compared: by bytes unless it is named with one of these.
enum class Rule {
  kLogits,   // difference below 5e-6
  kDecode,   // difference below 5e-6
  kPrefill,  // difference below 7e-6
  kLse,      // each within 1e-6, or 1e-4 of it
  kEqual,    // the same numbers; -0.0 is 0.0, any NaN another
};

inline bool equal(float got, float expected) {
  return got == expected || (std::isnan(got) && std::isnan(expected));
}

inline bool lse_close(float got, float expected) {
  if (!std::isfinite(got) || !std::isfinite(expected)) return equal(got, expected);
  return std::fabs(got - expected) <= std::fmax(1e-6f, 1e-4f * std::fabs(expected));
}

// The elements of `got` against those of `expected` (same shape, strides and dtype).
inline void expect_close(const TensorView& t, const std::uint8_t* got, const std::uint8_t* expected,
                         Rule rule, const std::string& what) {
  Difference difference;
  int wrong = 0;
  for_each_element(t, [&](std::size_t at) {
    const float x = load_float(got + at, t.dtype);
    const float y = load_float(expected + at, t.dtype);
    const bool alike = rule == Rule::kLse     ? lse_close(x, y)
                       : rule == Rule::kEqual ? equal(x, y)
                                              : difference.add(x, y);
    if (!alike && wrong++ < 3) ADD_FAILURE() << what << ": " << x << " instead of " << y;
  });
  EXPECT_LT(difference.value(), rule == Rule::kPrefill ? 7e-6 : 5e-6) << what;
}

}  // namespace dsa::test
