// SPDX-License-Identifier: Apache-2.0
// The decode kernel's queries in shared memory, by all warps but the producer's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/pair.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

// A power of two, and one over it.
struct QueryScale {
  std::uint32_t exponent;  // of fp32 and of bf16, with their bias

  __device__ float up() const { return __uint_as_float(exponent << 23); }
  __device__ float down() const { return __uint_as_float((254 - exponent) << 23); }
  __device__ std::uint32_t up_bf16x2() const { return exponent * 0x800080u; }
};

// They have been copied as they are. What meets e4m3 becomes f16: all times the power of two
// that brings the largest one of all heads just under 2^15, or 2^41 if that is less, exact for what
// is within 2^29 of it, and RoPE times the same. Of each 16 dims 4t, 4t + 1 move to 2t, 2t + 1 and
// 4t + 2, 4t + 3 to 2t + 8, 2t + 9, as the keys' come from ldmatrix. A warp has every twelfth head.
template <typename Config>
__device__ QueryScale convert_queries(typename Config::SharedStorage& shared) {
  constexpr int kWarps = Config::kReaderWarps, kThreads = 32 * kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto chunk = [&](int head, int i) {
    return shared.q[i / 8] + head * 128 + (i % 8 ^ head % 8) * 16;
  };
  ptx::mbarrier_wait(shared.full_q, 0);
  std::uint32_t largest = 0;  // bits of |q|, of finite ones: one head's must not take the others'
  const auto note_value = [&](std::uint32_t bits) {
    bits &= 0x7FFFu;
    if (bits < 0x7F80u) largest = std::max(largest, bits);
  };
  const auto note = [&](const uint4& x) {
    for (const std::uint32_t word : {x.x, x.y, x.z, x.w}) {
      note_value(word);
      note_value(word >> 16);
    }
  };
  for (int head = warp; head < Config::kHeads; head += kWarps) {
    note(*reinterpret_cast<const uint4*>(chunk(head, 2 * lane)));
    note(*reinterpret_cast<const uint4*>(chunk(head, 2 * lane + 1)));
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) shared.query_bits[warp] = largest;
  named_sync<kMathBarrier, kThreads>();
  for (const std::uint32_t bits : shared.query_bits) largest = std::max(largest, bits);
  // 2^15 / 2^(e - 126) brings [2^(e-127), 2^(e-126)) under 2^15; inf and NaN stay.
  const QueryScale scale{std::min(127 + 15 + 126 - std::max(largest >> 7, 100u), 254u)};

  const auto narrow = [&](std::uint32_t word) {
    const float2 x = unpack<__nv_bfloat16>(word);
    return pack<__half>(x.x * scale.up(), x.y * scale.up());
  };
  for (int head = warp; head < Config::kHeads; head += kWarps) {
    auto& first = *reinterpret_cast<uint4*>(chunk(head, 2 * lane));
    auto& second = *reinterpret_cast<uint4*>(chunk(head, 2 * lane + 1));
    const uint4 x = first, y = second;
    first = {narrow(x.x), narrow(x.z), narrow(y.x), narrow(y.z)};
    second = {narrow(x.y), narrow(x.w), narrow(y.y), narrow(y.w)};
    if (lane < Config::kRope / 8) {
      auto& rope = *reinterpret_cast<uint4*>(chunk(head, Config::kNope / 8 + lane));
      const std::uint32_t up = scale.up_bf16x2();
      const auto raise = [&](std::uint32_t word) { return times<__nv_bfloat16>(word, up); };
      rope = {raise(rope.x), raise(rope.y), raise(rope.z), raise(rope.w)};
    }
    if (lane == 0) shared.bases[head] = 0.0f;
  }
  ptx::fence_async_shared();  // for wgmma, which reads what all threads wrote
  named_sync<kMathBarrier, kThreads>();
  return scale;
}

}  // namespace dsa::cuda::sm90a
