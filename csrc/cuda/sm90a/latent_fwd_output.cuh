// SPDX-License-Identifier: Apache-2.0
// How a warpgroup that has half of the dims of 64 heads' output stores it.
#pragma once

#include <cstdint>

#include "cuda/common/pair.cuh"
#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::sm90a {

// A thread's part: sum(i) is of head row(i / 2 % 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2 of
// the half.
template <typename Config>
class LatentFwdOutput {
 public:
  using Element = typename Config::Element;

  __device__ LatentFwdOutput(int half, int warp, int lane)
      : half_(half), warp_(warp), lane_(lane) {}

  // This thread's two rows: heads.
  __device__ int row(int i) const { return 16 * warp_ + lane_ / 4 + 8 * i; }
  __device__ int head(int i) const { return row(i) % Config::kHeadsOfQuery; }  // of its query token

  // The output of `heads` heads in fp32, head h's at out + h * 512. sum(i): the i-th.
  template <typename Sum>
  __device__ void store(float* out, int heads, Sum&& sum) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row(i) >= heads) continue;
      float* to = out + row(i) * Config::kDimV + half_ * Config::kHalf + lane_ % 4 * 2;
#pragma unroll
      for (int j = 0; j < Config::kHalf / 8; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = {sum(4 * j + 2 * i), sum(4 * j + 2 * i + 1)};
      }
    }
  }

  // The same in 16 bits, head h's of query token j at out + j * query_stride + h * stride, on 16
  // bytes: 32 columns at a time by way of shared memory, 8 KiB for both halves, where a warp's 16
  // rows are its own.
  template <typename Sum>
  __device__ void store(std::uint16_t* out, std::int64_t query_stride, std::int64_t stride,
                        int heads, std::uint8_t* shared, Sum&& sum) const {
    constexpr int kColumns = 32, kRowBytes = 2 * kColumns;
    std::uint8_t* staged = shared + (4 * half_ + warp_) * 16 * kRowBytes;
    const auto address = [&](int r, int chunk) {
      return staged + r * kRowBytes + (chunk ^ r / 2 % 4) * 16;
    };
    const uint4* from[2];
    std::uint16_t* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      from[i] = reinterpret_cast<const uint4*>(address(row(i) % 16, lane_ % 4));
      to[i] = out + row(i) / Config::kHeadsOfQuery * query_stride + head(i) * stride +
              half_ * Config::kHalf + lane_ % 4 * 8;
    }
#pragma unroll
    for (int first = 0; first < Config::kHalf; first += kColumns) {
#pragma unroll
      for (int chunk = 0; chunk < 4; chunk += 2) {
        std::uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int i = first / 2 + 4 * chunk + 2 * k;
          words[k] = pack<Element>(sum(i), sum(i + 1));
        }
        ptx::stmatrix_x4(ptx::shared_address(address(lane_ % 16, chunk + lane_ / 16)), words);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 words = *from[i];
        if (head(i) < heads) *reinterpret_cast<uint4*>(to[i] + first) = words;
      }
      __syncwarp();
    }
  }

 private:
  const int half_, warp_, lane_;
};

}  // namespace dsa::cuda::sm90a
