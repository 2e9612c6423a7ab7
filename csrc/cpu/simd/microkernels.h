// SPDX-License-Identifier: Apache-2.0
// The vectorised inner loops of the CPU backend. microkernels.cpp is compiled once for each
// instruction set (cmake/DsaCpuIsa.cmake); microkernels() picks the best one this CPU runs.
#pragma once

#include <cstdint>

namespace dsa::cpu {

// All matrices are row-major fp32; every accumulation is fp32, in an order that depends on nothing
// but the arguments, so results do not change with the thread count.
struct MicroKernels {
  const char* isa;

  // out[j] = sum_i weights[i] * relu(sum_p a[i, p] * b[p, j]), i < m, j < n, p < k.
  // A NaN in a or b propagates. m, n, k >= 0, any value.
  void (*relu_weighted_sum)(int m, int n, int k, const float* a, std::int64_t lda, const float* b,
                            std::int64_t ldb, const float* weights, float* out);

  // c[i, j] = (accumulate ? c[i, j] : 0) + sum_p a[i, p] * b[p, j].
  void (*gemm)(int m, int n, int k, const float* a, std::int64_t lda, const float* b,
               std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate);

  // x[j] = 2^(x[j] - max); returns the sum of the new x. -inf gives 0. max must be finite.
  float (*exp2_minus_max)(int n, float max, float* x);

  // y[j] *= factor.
  void (*scale)(std::int64_t n, float factor, float* y);

  // Widening reads: dst[j] = float(src[j]) (* factor).
  void (*e4m3_to_f32)(std::int64_t n, const std::uint8_t* src, float factor, float* dst);
  void (*bf16_to_f32)(std::int64_t n, const std::uint16_t* src, float* dst);
  void (*f16_to_f32)(std::int64_t n, const std::uint16_t* src, float* dst);
};

const MicroKernels& microkernels();

}  // namespace dsa::cpu
