// SPDX-License-Identifier: Apache-2.0
// What nvcc gives to device code, for a C++ compiler: included before everything else.
#pragma once

#define __device__
#define __host__
#define __global__
#define __shared__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>

#include "machine.h"

#define threadIdx \
  (dsa::emulator::Index3{static_cast<unsigned>(dsa::emulator::thread_index()), 0, 0})
#define blockDim (dsa::emulator::Index3{static_cast<unsigned>(dsa::emulator::num_threads()), 1, 1})
#define blockIdx (dsa::emulator::cta_index())
#define gridDim (dsa::emulator::grid_size())

using std::isnan;
using std::max;
using std::min;

inline float __uint_as_float(std::uint32_t x) { return std::bit_cast<float>(x); }
inline std::uint32_t __float_as_uint(float x) { return std::bit_cast<std::uint32_t>(x); }

inline void __syncthreads() { dsa::emulator::barrier_sync(0, dsa::emulator::num_threads()); }

// Of whole warps only.
inline void dsa_all_lanes(unsigned mask) {
  if (mask != ~0u) dsa::emulator::fail("not all lanes of a warp");
}
inline void __syncwarp(unsigned mask = ~0u) {
  dsa_all_lanes(mask);
  dsa::emulator::exchange(0);
}
template <typename T>
T dsa_of_lane(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  dsa_all_lanes(mask);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = dsa::emulator::exchange(bits)[static_cast<std::size_t>(lane % 32)];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return dsa_of_lane(mask, value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return dsa_of_lane(mask, value, dsa::emulator::thread_index() % 32 ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, int flag) {
  dsa_all_lanes(mask);
  const auto& values = dsa::emulator::exchange(flag != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(values[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) != 0; }
inline int __all_sync(unsigned mask, int flag) { return __ballot_sync(mask, flag) == ~0u; }
template <typename Reduce>
unsigned dsa_of_all(unsigned mask, unsigned value, Reduce&& reduce) {
  dsa_all_lanes(mask);
  const auto& values = dsa::emulator::exchange(value);
  return static_cast<unsigned>(reduce(values.begin(), values.end()));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return dsa_of_all(mask, value, [](auto i, auto end) { return *std::max_element(i, end); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return dsa_of_all(mask, value, [](auto i, auto end) { return *std::min_element(i, end); });
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return dsa_of_all(mask, value, [](auto i, auto end) { return std::reduce(i, end); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = dsa::emulator::thread_index() % 32;
  return dsa_of_lane(mask, value, lane >= lanes ? lane - lanes : lane);
}

inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
inline int __popc(unsigned x) { return std::popcount(x); }
// CTAs, and threads but where they wait, come one after another.
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}
template <typename T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
template <typename T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}

// Byte i of the result is byte (selector >> 4 i) % 8 of y:x.
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const auto byte = static_cast<std::uint32_t>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xFFu);
    result |= byte << 8 * i;
  }
  return result;
}
// Of the halves each.
inline std::uint32_t __vmaxu2(std::uint32_t x, std::uint32_t y) {
  return std::max(x & 0xFFFF'0000u, y & 0xFFFF'0000u) | std::max(x & 0xFFFFu, y & 0xFFFFu);
}
