// SPDX-License-Identifier: Apache-2.0
// hadamard_transform: in fp32, one butterfly for each bit of an element's index. A bit is cheapest
// where both of its elements are in one thread; which index bits a thread's registers stand for is
// what the two kernels below are about. A row is read before any of it is written, so that out may
// be x.
//
// Warp kernel, n <= 1024: a row is in a power of two of neighbouring lanes. A lane holds kUnits
// units of 16 bytes, one every `lanes` units, so that lanes load and store neighbouring units: an
// element's lowest bits are its place in a unit, then come the lane's, then the unit's number. Only
// the lane's bits take shuffles. 32 elements a lane from n = 32 on, else one unit. No shared
// memory, no barriers.
//
// Cta kernel, n >= 2048: a row a cta, kCtaValues = 32 elements (5 bits) of each part a thread. A
// part is the row up to 16384 elements; a row of 32768 is two, whose top bit is a butterfly between
// registers. The bits take three turns in the registers:
//   - A, bits {0, 6, 7, 8, 9}, as loaded: lanes hold neighbouring pairs, so that a warp reads whole
//     lines;
//   - B, bits {1, 2, 3, 4, 5};
//   - C, bits {0, top four}, as stored, again neighbouring pairs.
// Between turns the part passes through shared memory, n fp32 with 2 words of padding behind each
// 64: pairs (A, C) and a stride of 66 words every other lane (B) then have no bank conflicts.
// Barriers: all threads between A's writes and B's reads, B's writes and C's reads, and before the
// next part's writes. B reads and writes the same words of its own.
#pragma once

#include <cstdint>

#include "cuda/common/tensor_rows.cuh"
#include "cuda/common/vector.cuh"

namespace dsa::cuda {

// Sum and difference of the elements that differ in bit kBit of their register's number.
template <int kBit, int kCount>
__device__ __forceinline__ void butterfly(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >> kBit & 1) continue;
    const float low = x[i], high = x[i | 1 << kBit];
    x[i] = low + high;
    x[i | 1 << kBit] = low - high;
  }
}

// The butterflies of register bits kBit to kEnd - 1, as far as a row of n elements has them.
template <int kBit, int kEnd, int kCount>
__device__ __forceinline__ void butterflies(float (&x)[kCount], int n) {
  if constexpr (kBit < kEnd) {
    if (n > 1 << kBit) butterfly<kBit>(x);
    butterflies<kBit + 1, kEnd>(x, n);
  }
}

inline constexpr int kHadamardWarpThreads = 256;
inline constexpr int kLog2WarpValues = 5;  // of a lane, where a row has as many

template <typename T>
inline constexpr int kLog2Unit = sizeof(T) == 2 ? 3 : 2;

template <typename T, int kLog2Units, bool kWhole>
__global__ void __launch_bounds__(kHadamardWarpThreads)
    portable_hadamard_warp_kernel(TensorRows x, TensorRows out, int log2_lanes, float scale) {
  constexpr int kUnit = 1 << kLog2Unit<T>;
  constexpr int kUnits = 1 << kLog2Units;
  constexpr int kValues = kUnit * kUnits;
  const int lanes = 1 << log2_lanes;  // of a row
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & (lanes - 1);
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kHadamardWarpThreads >> log2_lanes) + (thread >> log2_lanes);
  // Lanes past the last row go on with nothing, since the warp's shuffles need all lanes.
  const bool any = row < x.count();
  const int n = kUnits > 1 ? kValues << log2_lanes : static_cast<int>(x.width());
  const auto begin = [&](int unit) { return (unit << log2_lanes | lane) * kUnit; };

  const T* x_row = x.row<const T>(any ? row : 0);
  Pack<T, kUnit> units[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    units[i] = load<kWhole, T, kUnit>(x_row + begin(i), any ? n - begin(i) : 0);
  }
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = to_float(units[i / kUnit], i % kUnit);

  butterflies<0, kLog2Unit<T>>(values, kUnits > 1 ? kValues : n);
  for (int mask = 1; mask < lanes; mask *= 2) {
    const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = fmaf(sign, values[i], __shfl_xor_sync(kAllLanes, values[i], mask));
    }
  }
  butterflies<kLog2Unit<T>, kLog2Unit<T> + kLog2Units>(values, kValues);
  if (!any) return;
  T* out_row = out.row<T>(row);
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    float scaled[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) scaled[j] = values[i * kUnit + j] * scale;
    store<kWhole>(out_row + begin(i), pack_from_float<T>(scaled), n - begin(i));
  }
}

inline constexpr int kCtaValues = 32;
inline constexpr int kMaxPart = 16384;  // elements that pass through shared memory together
inline constexpr int kMaxHadamardCtaThreads = kMaxPart / kCtaValues;

constexpr int padded_word(int index) { return index + 2 * (index >> 6); }
constexpr std::size_t hadamard_shared_bytes(std::int64_t part) {
  return static_cast<std::size_t>(padded_word(static_cast<int>(part))) * sizeof(float);
}

// The first of the pair of elements that registers 2 * group, 2 * group + 1 of a thread hold when
// they stand for bit 0 and the four bits from `shift` on.
__device__ __forceinline__ int pair_index(int thread, int group, int shift) {
  const int low = thread & ((1 << (shift - 1)) - 1);
  return low << 1 | group << shift | thread >> (shift - 1) << (shift + 4);
}

template <typename T, int kParts, bool kWhole>
__global__ void __launch_bounds__(kMaxHadamardCtaThreads)
    portable_hadamard_cta_kernel(TensorRows x, TensorRows out, int log2_part, float scale) {
  constexpr int kShiftA = 6;
  constexpr int kPairs = kCtaValues / 2;
  extern __shared__ __align__(sizeof(float2)) float shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int part_size = 1 << log2_part;
  const int shift_c = log2_part - 4;

  float values[kParts][kCtaValues];
  const T* x_row = x.row<const T>(blockIdx.x);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    Pack<T, 2> pairs[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] = load<kWhole, T, 2>(x_row + part * part_size + pair_index(thread, i, kShiftA), 2);
    }
#pragma unroll
    for (int i = 0; i < kCtaValues; ++i) values[part][i] = to_float(pairs[i / 2], i % 2);
  }
  if constexpr (kParts == 2) {
#pragma unroll
    for (int i = 0; i < kCtaValues; ++i) {
      const float low = values[0][i], high = values[1][i];
      values[0][i] = low + high;
      values[1][i] = low - high;
    }
  }

  T* out_row = out.row<T>(blockIdx.x);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float (&v)[kCtaValues] = values[part];
    butterfly<0>(v);
    butterfly<1>(v);
    butterfly<2>(v);
    butterfly<3>(v);
    butterfly<4>(v);
    if (part > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      *reinterpret_cast<float2*>(shared + padded_word(pair_index(thread, i, kShiftA))) =
          make_float2(v[2 * i], v[2 * i + 1]);
    }
    __syncthreads();

    // Turn B: bit 0 and the bits from 6 on are the thread's. All 32 lie in one run of 64 words.
    float* own = shared + padded_word((thread >> 1) << 6) + (thread & 1);
#pragma unroll
    for (int i = 0; i < kCtaValues; ++i) v[i] = own[2 * i];
    butterfly<0>(v);
    butterfly<1>(v);
    butterfly<2>(v);
    butterfly<3>(v);
    butterfly<4>(v);
#pragma unroll
    for (int i = 0; i < kCtaValues; ++i) own[2 * i] = v[i];
    __syncthreads();

#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(shared + padded_word(pair_index(thread, i, shift_c)));
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
    // Registers' bits 1 to 4 are index bits shift_c to shift_c + 3; those below 10 were A's.
    if (shift_c + 0 >= 10) butterfly<1>(v);
    if (shift_c + 1 >= 10) butterfly<2>(v);
    if (shift_c + 2 >= 10) butterfly<3>(v);
    if (shift_c + 3 >= 10) butterfly<4>(v);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float pair[2] = {v[2 * i] * scale, v[2 * i + 1] * scale};
      store<kWhole>(out_row + part * part_size + pair_index(thread, i, shift_c),
                    pack_from_float<T>(pair), 2);
    }
  }
}

}  // namespace dsa::cuda
