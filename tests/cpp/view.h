// SPDX-License-Identifier: Apache-2.0
// TensorViews of vectors, for tests. A vector is as long as its tensor, so that a sanitizer sees
// any access beside it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "dsa/params.h"

namespace dsa::test {

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, std::uint8_t>) return DType::kUInt8;
  if constexpr (std::is_same_v<T, std::int32_t>) return DType::kInt32;
  if constexpr (std::is_same_v<T, std::int64_t>) return DType::kInt64;
  return DType::kBFloat16;  // std::uint16_t, unless the test says otherwise
}

// A contiguous tensor over all of `data`.
template <typename T>
TensorView view(std::vector<T>& data, std::initializer_list<std::int64_t> sizes,
                DType dtype = dtype_of<T>()) {
  TensorView v;
  v.data = data.data();
  v.dtype = dtype;
  v.ndim = static_cast<std::int32_t>(sizes.size());
  int dim = 0;
  for (const std::int64_t size : sizes) v.sizes[dim++] = size;
  std::int64_t stride = 1;
  while (dim-- > 0) {
    v.strides[dim] = stride;
    stride *= v.sizes[dim];
  }
  return v;
}

// A tensor of any strides (elements) that begins at `data`.
template <typename T>
TensorView strided_view(T* data, std::initializer_list<std::int64_t> sizes,
                        std::initializer_list<std::int64_t> strides, DType dtype = dtype_of<T>()) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = static_cast<std::int32_t>(sizes.size());
  int dim = 0;
  for (const std::int64_t size : sizes) v.sizes[dim++] = size;
  dim = 0;
  for (const std::int64_t stride : strides) v.strides[dim++] = stride;
  return v;
}

}  // namespace dsa::test
