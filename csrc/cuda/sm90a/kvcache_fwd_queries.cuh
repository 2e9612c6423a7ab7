// SPDX-License-Identifier: Apache-2.0
// The decode kernel's queries in shared memory, by all warps but the producer's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/pair.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

// A power of two, and one over it.
struct QueryScale {
  std::uint32_t exponent;  // of fp32 and of bf16, with their bias

  __device__ float down() const { return __uint_as_float((254 - exponent) << 23); }
  __device__ std::uint32_t up_bf16x2() const { return exponent * 0x800080u; }
};

// They have been copied as they are. What meets e4m3 becomes f16: all times the power of two
// that brings the largest one of all heads just under 2^15, or 2^41 if that is less, exact for what
// is within 2^29 of it, and RoPE times the same. Of each 16 dims 4t, 4t + 1 move to 2t, 2t + 1 and
// 4t + 2, 4t + 3 to 2t + 8, 2t + 9, as the keys' come from ldmatrix. A warp has up to 256
// dims of two heads at a time, so that eight lanes read different banks.
template <typename Config>
__device__ QueryScale convert_queries(typename Config::SharedStorage& shared) {
  constexpr int kWarps = Config::kReaderWarps, kThreads = 32 * kWarps;
  constexpr int kParts = (Config::kNope + 255) / 256, kChunks = Config::kNope / 8;
  const int thread = ptx::thread_index(), warp = thread / 32, lane = thread % 32;
  const auto chunk = [&](int head, int i) -> uint4& {
    return *reinterpret_cast<uint4*>(shared.q[i / 8] + head * 128 + (i % 8 ^ head % 8) * 16);
  };
  // use(16 dims of a head, in two halves), of this thread's.
  const auto for_each = [&](auto&& use) {
    for (int i = warp; i < Config::kHeads / 2 * kParts; i += kWarps) {
      const int head = i / kParts * 2 + lane / 4 % 2;
      const int first = (i % kParts * 4 + lane / 8) * 8 + lane % 4 * 2;
      if (Config::kNope % 256 == 0 || first < kChunks) {
        use(chunk(head, first), chunk(head, first + 1));
      }
    }
  };
  ptx::mbarrier_wait(shared.full_q, 0);
  // Of two bf16 each |q| + 2^7, in bits: the exponent and one. Of inf and NaN 0: one head's must
  // not take the others'.
  std::uint32_t largest = 0;
  const auto note = [&](std::uint32_t word) {
    largest = __vmaxu2(largest, ((word & 0x7FFF7FFFu) + 0x00800080u) & 0x7FFF7FFFu);
  };
  for_each([&](const uint4& x, const uint4& y) {
    for (const std::uint32_t word : {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w}) note(word);
  });
  largest = __reduce_max_sync(~0u, std::max(largest & 0xFFFFu, largest >> 16));
  if (lane == 0) shared.query_bits[warp] = largest;
  ptx::named_sync<kMathBarrier, kThreads>();
  for (const std::uint32_t bits : shared.query_bits) largest = std::max(largest, bits);
  // 2^15 / 2^(e - 126) brings [2^(e-127), 2^(e-126)) under 2^15; inf and NaN stay.
  const QueryScale scale{std::min(127 + 15 + 126 + 1 - std::max(largest >> 7, 101u), 254u)};

  const std::uint32_t up = scale.up_bf16x2();
  const auto raise = [&](std::uint32_t word) { return times<__nv_bfloat16>(word, up); };
  const auto narrow = [&](std::uint32_t word) {
    const float2 x = unpack<__nv_bfloat16>(raise(word));
    return pack<__half>(x.x, x.y);
  };
  for_each([&](uint4& first, uint4& second) {
    const uint4 x = first, y = second;
    first = {narrow(x.x), narrow(x.z), narrow(y.x), narrow(y.z)};
    second = {narrow(x.y), narrow(x.w), narrow(y.y), narrow(y.w)};
  });
  for (int i = thread; i < Config::kHeads * (Config::kRope / 8); i += kThreads) {
    uint4& rope = chunk(i / (Config::kRope / 8), kChunks + i % (Config::kRope / 8));
    rope = {raise(rope.x), raise(rope.y), raise(rope.z), raise(rope.w)};
  }
  if (thread < Config::kHeads) {
    shared.bases[thread] = 0.0f;
    shared.has_base[thread] = 0;
  }
  ptx::fence_async_shared();  // for wgmma, which reads what all threads wrote
  ptx::named_sync<kMathBarrier, kThreads>();
  return scale;
}

}  // namespace dsa::cuda::sm90a
