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

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/ldst.cuh"
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

// What a lane loads of a row at a time.
template <int kHeadDim>
struct LaneUnit {
  static constexpr int kBytes = kHeadDim >= 64 ? 16 : 8;
  static constexpr int kWords = kBytes / 4;
  static constexpr int kUnits = kHeadDim / 4 / kBytes;  // of a row

  alignas(kBytes) std::uint32_t word[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
  }

  __device__ __forceinline__ void load(const std::uint8_t* from, int alignment) {
    if (alignment >= kBytes) {
      load_words<kBytes, kBytes>(from, word);
    } else if (alignment >= 4) {
      load_words<kBytes, 4>(from, word);
    } else {
      load_words<kBytes, 1>(from, word);
    }
  }
};

// Unit u of the row at `from` to to[u * kPitch], past the registers where the alignment allows.
// With valid false nothing is read and zeros are written.
template <int kHeadDim, int kPitch>
__device__ __forceinline__ void copy_row(LaneUnit<kHeadDim>* to, const std::uint8_t* from, int t,
                                         bool valid, int alignment) {
  using Unit = LaneUnit<kHeadDim>;
#pragma unroll
  for (int u = 0; u < Unit::kUnits; ++u) {
    const std::uint8_t* unit = from + (u * 4 + t) * Unit::kBytes;
    const std::uint32_t address = ptx::shared_address(to + u * kPitch);
    if (valid && Unit::kBytes == 16 && alignment >= 16) {
      ptx::cp_async<16>(address, unit);
    } else if (valid && alignment >= 4) {
#pragma unroll
      for (int i = 0; i < Unit::kWords; ++i) ptx::cp_async<4>(address + 4 * i, unit + 4 * i);
    } else {
      Unit words;
      words.clear();
      if (valid) words.load(unit, 1);
      to[u * kPitch] = words;
    }
  }
}

__device__ __forceinline__ void copy_float(float* to, const std::uint8_t* from, bool valid,
                                           int alignment) {
  if (valid && alignment >= 4) {
    ptx::cp_async<4>(ptx::shared_address(to), from);
  } else {
    std::uint32_t word = 0;
    if (valid) load_words<4, 1>(from, &word);
    *to = __uint_as_float(word);
  }
}

// e4m3 widened to f16 (SM80). Each word makes two registers of two values, in an order that is the
// same for A and B.
template <int kHeadDim>
struct WidenedProducts {
  static constexpr int kUnitSteps = LaneUnit<kHeadDim>::kWords;  // of 16 dimensions
  static constexpr bool kWidensInside = false;

#if __CUDA_ARCH__ >= 890
  static constexpr float kSumScale = 1.0f;

  __device__ __forceinline__ static void fragments(const LaneUnit<kHeadDim>& unit,
                                                   std::uint32_t (&f)[kUnitSteps][2]) {
#pragma unroll
    for (int i = 0; i < kUnitSteps; ++i) {
      const uint2 halves = ptx::f16x4_from_e4m3x4(unit.word[i]);
      f[i][0] = halves.x;
      f[i][1] = halves.y;
    }
  }
#else
  // The bits of a code, shifted to the exponent of f16, are its value * 2^-8, subnormals too; the
  // tensor cores multiply f16 subnormals exactly. NaN codes would become numbers: a unit with one
  // gets a NaN, which is enough to make all products of its row NaN.
  static constexpr float kSumScale = 0x1p16f;  // takes both 2^-8 back

  __device__ __forceinline__ static void fragments(const LaneUnit<kHeadDim>& unit,
                                                   std::uint32_t (&f)[kUnitSteps][2]) {
    std::uint32_t nans = 0;
#pragma unroll
    for (int i = 0; i < kUnitSteps; ++i) {
      const std::uint32_t x = unit.word[i];
      f[i][0] = (x & 0x0080'0080u) << 8 | (x & 0x007F'007Fu) << 7;
      f[i][1] = (x & 0x8000'8000u) | (x & 0x7F00'7F00u) >> 1;
      nans |= ((x & 0x7F7F'7F7Fu) + 0x0101'0101u) & 0x8080'8080u;
    }
    if (nans != 0) f[0][0] = 0x7E00'7E00u;
  }
#endif

  __device__ __forceinline__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
    ptx::mma_16816<__half>(d, a, b0, b1);
  }
};

// e4m3 as it is (SM89).
template <int kHeadDim>
struct E4m3Products {
  static constexpr int kUnitSteps = LaneUnit<kHeadDim>::kWords / 2;  // of 32 dimensions
  static constexpr float kSumScale = 1.0f;
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  static constexpr bool kWidensInside = true;  // to f16, by the assembler
#else
  static constexpr bool kWidensInside = false;
#endif

  __device__ __forceinline__ static void fragments(const LaneUnit<kHeadDim>& unit,
                                                   std::uint32_t (&f)[kUnitSteps][2]) {
#pragma unroll
    for (int i = 0; i < kUnitSteps; ++i) {
      f[i][0] = unit.word[2 * i];
      f[i][1] = unit.word[2 * i + 1];
    }
  }

  __device__ __forceinline__ static void mma(float (&d)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
    ptx::mma_16832_e4m3(d, a, b0, b1);
  }
};

}  // namespace dsa::cuda
