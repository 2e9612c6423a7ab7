// SPDX-License-Identifier: Apache-2.0
// The rows of a tensor: its last dimension is a contiguous vector, all others are walked in order,
// whatever their strides.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/convert.h"
#include "dsa/params.h"

namespace dsa::cpu {

class TensorRows {
 public:
  // A tensor whose rows are empty has none, so that no address is formed from its null pointer.
  explicit TensorRows(const TensorView& tensor)
      : tensor_(tensor), count_(tensor.size(-1) > 0 ? 1 : 0) {
    for (int dim = 0; dim < tensor.ndim - 1; ++dim) count_ *= tensor.size(dim);
  }

  std::int64_t count() const { return count_; }
  std::int64_t width() const { return tensor_.size(-1); }

  // Elements from the tensor's first to row `row`'s first.
  std::int64_t offset(std::int64_t row) const {
    std::int64_t offset = 0;
    for (int dim = tensor_.ndim - 2; dim > 0; --dim) {
      offset += row % tensor_.size(dim) * tensor_.stride(dim);
      row /= tensor_.size(dim);
    }
    return tensor_.ndim > 1 ? offset + row * tensor_.stride(0) : offset;
  }

  template <typename T>
  T* row(std::int64_t row) const {
    return tensor_.ptr<T>() + offset(row);
  }

  // For f32, bf16 and f16 tensors.
  void load(std::int64_t row, float* dst) const {
    load_as_float(element(tensor_.data, tensor_.dtype, offset(row)), tensor_.dtype, 1, width(),
                  dst);
  }
  void store(std::int64_t row, const float* src) const {
    store_from_float(src, width(), tensor_.dtype,
                     element(tensor_.data, tensor_.dtype, offset(row)));
  }

 private:
  TensorView tensor_;
  std::int64_t count_;
};

// The grain of a loop over rows of `elements` each: less work than this is not worth a thread.
inline std::int64_t row_grain(std::int64_t elements) {
  constexpr std::int64_t kMinElements = 32768;
  return kMinElements / std::max<std::int64_t>(elements, 1) + 1;
}

}  // namespace dsa::cpu
