// SPDX-License-Identifier: Apache-2.0
// The rows of a tensor, as cpu/tensor_rows.h has them: the last dimension is a contiguous vector,
// all others are walked in order, whatever their strides.
#pragma once

#include <cstdint>

#include "cuda/common/fast_divisor.h"
#include "dsa/params.h"

namespace dsa::cuda {

class TensorRows {
 public:
  // Neighbouring dimensions that one stride walks become one: most tensors then need no division.
  explicit TensorRows(const TensorView& tensor)
      : data_(tensor.data), count_(tensor.size(-1) > 0 ? 1 : 0), width_(tensor.size(-1)) {
    std::int64_t sizes[kMaxDims];
    for (int dim = tensor.ndim - 2; dim >= 0; --dim) {
      const std::int64_t size = tensor.sizes[dim], stride = tensor.strides[dim];
      count_ *= size;
      if (size <= 1) continue;
      if (num_dims_ > 0 && stride == strides_[num_dims_ - 1] * sizes[num_dims_ - 1]) {
        sizes[num_dims_ - 1] *= size;
      } else {
        strides_[num_dims_] = stride;
        sizes[num_dims_++] = size;
      }
    }
    for (int dim = 0; dim + 1 < num_dims_; ++dim) sizes_[dim] = FastDivisor(sizes[dim]);
  }

  DSA_HOST_DEVICE std::int64_t count() const { return count_; }
  DSA_HOST_DEVICE std::int64_t width() const { return width_; }

  template <typename T>
  __device__ T* row(std::int64_t row) const {
    std::int64_t offset = 0;
#pragma unroll 1
    for (int dim = 0; dim + 1 < num_dims_; ++dim) {
      const std::int64_t outer = sizes_[dim].quotient(row);
      offset += (row - outer * sizes_[dim].divisor()) * strides_[dim];
      row = outer;
    }
    if (num_dims_ > 0) offset += row * strides_[num_dims_ - 1];
    return static_cast<T*>(data_) + offset;
  }

 private:
  void* data_;
  std::int64_t count_;
  std::int64_t width_;
  int num_dims_ = 0;
  FastDivisor sizes_[kMaxDims];  // innermost first; the outermost needs none
  std::int64_t strides_[kMaxDims] = {};
};

}  // namespace dsa::cuda
