// SPDX-License-Identifier: Apache-2.0
// e4m3 products on the tensor cores: rows of e4m3 in memory -> mma.sync fragments.
//
// A dot product may take its dimensions in any order, so long as both operands take the same. So no
// fragment is shuffled: of a row (head or key) the lane (g, t) = (lane / 4, lane % 4) owns what it
// loads, D / 4 bytes in units of 16 (8 for D = 32), unit t, and for D = 128 unit t + 4. Two
// registers of those bytes make its part of a k-step, for A and for B alike.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx/mma.cuh"

namespace dsa::cuda {

// kBytes bytes as words, at an address that is a multiple of `kAlignment`.
template <int kBytes, int kAlignment>
__device__ __forceinline__ void load_words(const std::uint8_t* from, std::uint32_t* words) {
  if constexpr (kAlignment >= 16 && kBytes == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kAlignment >= 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (kAlignment >= 4) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      words[i] = __ldg(reinterpret_cast<const std::uint32_t*>(from) + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) words[i] |= std::uint32_t{__ldg(from + 4 * i + b)} << 8 * b;
    }
  }
}

__device__ __forceinline__ float load_float(const std::uint8_t* from, int alignment) {
  std::uint32_t word;
  alignment >= 4 ? load_words<4, 4>(from, &word) : load_words<4, 1>(from, &word);
  return __uint_as_float(word);
}

// The words of one row that a lane owns.
template <int kHeadDim>
struct LaneWords {
  static constexpr int kUnitBytes = kHeadDim >= 64 ? 16 : 8;
  static constexpr int kUnits = kHeadDim / 4 / kUnitBytes;
  static constexpr int kWords = kHeadDim / 16;

  std::uint32_t word[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
  }

  __device__ __forceinline__ void load(const std::uint8_t* row, int t, int alignment) {
    if (alignment >= kUnitBytes) {
      load_units<kUnitBytes>(row, t);
    } else if (alignment >= 4) {
      load_units<4>(row, t);
    } else {
      load_units<1>(row, t);
    }
  }

 private:
  template <int kAlignment>
  __device__ __forceinline__ void load_units(const std::uint8_t* row, int t) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      load_words<kUnitBytes, kAlignment>(row + (u * 4 + t) * kUnitBytes, word + u * kUnitBytes / 4);
    }
  }
};

// e4m3 widened to f16 (SM80). The bits of a code, shifted to the exponent of f16, are its value *
// 2^-8, subnormals too; the tensor cores multiply f16 subnormals exactly. NaN codes would become
// numbers and are patched.
template <int kHeadDim>
struct WidenedProducts {
  static constexpr int kWords = LaneWords<kHeadDim>::kWords;
  static constexpr int kSteps = kWords;        // of 16 dimensions
  static constexpr float kSumScale = 0x1p16f;  // takes both 2^-8 back

  // Bytes 0 and 2 of a word, then 1 and 3.
  __device__ __forceinline__ static void fragments(const LaneWords<kHeadDim>& lane,
                                                   std::uint32_t (&f)[kSteps][2]) {
    std::uint32_t nans = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const std::uint32_t x = lane.word[i];
      f[i][0] = (x & 0x0080'0080u) << 8 | (x & 0x007F'007Fu) << 7;
      f[i][1] = (x & 0x8000'8000u) | (x & 0x7F00'7F00u) >> 1;
      nans |= nan_flags(x);
    }
    if (nans == 0) return;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      constexpr std::uint32_t kF16NaN = 0x7E00;
      const std::uint32_t flags = nan_flags(lane.word[i]);
      f[i][0] |= (flags >> 7 & 0x0001'0001u) * kF16NaN;
      f[i][1] |= (flags >> 15 & 0x0001'0001u) * kF16NaN;
    }
  }

  __device__ __forceinline__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
    ptx::mma_16816<__half>(d, a, b0, b1);
  }

 private:
  // The top bit of each byte that is a NaN code.
  __device__ __forceinline__ static std::uint32_t nan_flags(std::uint32_t x) {
    return ((x & 0x7F7F'7F7Fu) + 0x0101'0101u) & 0x8080'8080u;
  }
};

// e4m3 as it is (SM89).
template <int kHeadDim>
struct E4m3Products {
  static constexpr int kSteps = LaneWords<kHeadDim>::kWords / 2;  // of 32 dimensions
  static constexpr float kSumScale = 1.0f;

  __device__ __forceinline__ static void fragments(const LaneWords<kHeadDim>& lane,
                                                   std::uint32_t (&f)[kSteps][2]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      f[i][0] = lane.word[2 * i];
      f[i][1] = lane.word[2 * i + 1];
    }
  }

  __device__ __forceinline__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
    ptx::mma_16832_e4m3(d, a, b0, b1);
  }
};

}  // namespace dsa::cuda
