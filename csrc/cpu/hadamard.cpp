// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

// x <- H_n x, H_n the Sylvester matrix (natural order), n a power of two: in step `half`, elements
// that differ in that bit of their index become sum and difference.
void walsh_hadamard(float* x, std::int64_t n) {
  for (std::int64_t half = 1; half < n; half *= 2) {
    for (std::int64_t begin = 0; begin < n; begin += 2 * half) {
      float* low = x + begin;
      float* high = low + half;
      for (std::int64_t i = 0; i < half; ++i) {
        const float sum = low[i] + high[i];
        high[i] = low[i] - high[i];
        low[i] = sum;
      }
    }
  }
}

}  // namespace

Status hadamard_transform(const HadamardParams& params) {
  const TensorRows x(params.x);
  const TensorRows out(params.out);
  const std::int64_t n = x.width();
  const double orthonormal = 1.0 / std::sqrt(static_cast<double>(n));
  const auto scale = static_cast<float>(params.scale.value_or(orthonormal));
  parallel_for(0, x.count(), row_grain(n), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row_values(static_cast<std::size_t>(n));
    for (std::int64_t row = begin; row < end; ++row) {
      x.load(row, row_values.data());
      walsh_hadamard(row_values.data(), n);
      for (float& value : row_values) value *= scale;
      out.store(row, row_values.data());
    }
  });
  return {};
}

}  // namespace dsa::cpu
