// SPDX-License-Identifier: Apache-2.0
// Scores as selection ranks them: fp32, bf16 or f16 bits -> an unsigned key of as few bits as tell
// the scores of that type apart. No score has the key 0, which stands for "nothing here".
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "core/float_bits.h"
#include "core/float_order.h"
#include "core/half.h"
#include "dsa/params.h"

namespace dsa::cuda::topk {

struct F32Score {
  using Bits = std::uint32_t;
  static constexpr int kKeyBits = 32;
  static __device__ float to_float(Bits bits) { return float_from_bits(bits); }
  static __device__ float ranked(Bits bits) { return to_float(bits); }
};

struct Bf16Score {
  using Bits = std::uint16_t;
  static constexpr int kKeyBits = 16;
  static __device__ float to_float(Bits bits) { return bf16_to_float(bits); }
  static __device__ float ranked(Bits bits) { return to_float(bits); }
};

// Widened to fp32, f16 fills the sign, the exponent and the upper 10 bits of the mantissa.
struct F16Score {
  using Bits = std::uint16_t;
  static constexpr int kKeyBits = 1 + 8 + 10;
  static __device__ float to_float(Bits bits) { return f16_to_float(bits); }
  // Of a NaN, another one perhaps.
  static __device__ float ranked(Bits bits) { return __half2float(__ushort_as_half(bits)); }
};

// NaN, lowest of all, has the key 1, which is still below -inf's in each type.
template <typename Score>
__device__ std::uint32_t score_key(typename Score::Bits bits) {
  constexpr std::uint32_t kMinusInf = ordered_key(float_from_bits(kF32SignBit | kF32InfBits));
  static_assert(kMinusInf >> (32 - Score::kKeyBits) > 1u);
  const float score = Score::ranked(bits) + 0.0f;  // -0.0 becomes +0.0
  const std::uint32_t key = ordered_key_of_bits(float_to_bits(score)) >> (32 - Score::kKeyBits);
  return score != score ? 1u : key;
}

// use(Score{}) for scores of that type.
template <typename Use>
auto with_score(DType dtype, Use&& use) {
  switch (dtype) {
    case DType::kBFloat16: return use(Bf16Score{});
    case DType::kFloat16: return use(F16Score{});
    default: return use(F32Score{});
  }
}

}  // namespace dsa::cuda::topk
