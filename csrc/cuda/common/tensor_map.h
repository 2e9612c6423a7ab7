// SPDX-License-Identifier: Apache-2.0
// Descriptors for the copy engine, made on the host and passed to kernels by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "dsa/status.h"

namespace dsa::cuda {

// A tensor of bytes, dimension 0 contiguous; strides in bytes, of dimensions 1 and up.
struct ByteTensor {
  const void* data;
  int rank;  // 2 to 4
  std::int64_t size[4];
  std::int64_t stride[3];
  std::int32_t box[4];  // box[0] is 32, 64 or 128, and the swizzle as wide
};

Status make_tensor_map(const ByteTensor& tensor, CUtensorMap& map);

// What the copy engine asks of a tensor: the address and a stride on 16 bytes, no stride of 0.
inline bool tensor_map_takes(const void* data, std::int64_t stride) {
  return stride > 0 && stride % 16 == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace dsa::cuda
