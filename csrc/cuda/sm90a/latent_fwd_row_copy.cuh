// SPDX-License-Identifier: Apache-2.0
// How four warps copy 64 rows of latents, or of queries, to shared memory, 16 bytes a lane.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::sm90a {

// A warp copies 16 rows, each of which a lane has looked up: a lane 16 of each 128 bytes of four of
// them.
class LatentRowCopy {
 public:
  static constexpr int kTileRows = 64;
  static constexpr int kThreads = 128;

  // The row that this lane looks up; two lanes have the same.
  __device__ static int own_row(int warp, int lane) {
    return kRows * warp + lane % kRows + lane / kRows % kRows * kRowsApart;
  }

  // own: where the row is that this lane has looked up; nullptr: zeros. By whole warps.
  __device__ LatentRowCopy(const std::uint8_t* own, int warp, int lane)
      : first_(kRows * warp + lane / 8), chunk_(lane % 8) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::uint64_t row =
          __shfl_sync(~0u, reinterpret_cast<std::uint64_t>(own), lane / 8 + i * kRows);
      is_there_[i] = row != 0;
      from_[i] = reinterpret_cast<const std::uint8_t*>(row) + chunk_ * 16;
    }
  }

  // The 128 bytes from `dims` * 128 on, of the rows before kEnd, to [rows, 128 bytes], swizzled.
  template <int kEnd = kTileRows>
  __device__ void copy(std::uint8_t* block, int dims) const {
    const std::uint32_t to = ptx::shared_address(block) + first_ * 128 + (chunk_ ^ first_ % 8) * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (kEnd < (i + 1) * kRowsApart && first_ + i * kRowsApart >= kEnd) continue;
      ptx::cp_async_or_zeros<16>(to + i * kRowsApart * 128, from_[i] + dims * 128, is_there_[i]);
    }
  }

 private:
  static constexpr int kRows = 4;  // of a lane, from one to the next 16
  static constexpr int kRowsApart = 16;
  static_assert(kThreads / 32 * kRows == kRowsApart && kRows * kRowsApart == kTileRows);

  const int first_, chunk_;
  const std::uint8_t* from_[kRows];
  bool is_there_[kRows];
};

}  // namespace dsa::cuda::sm90a
