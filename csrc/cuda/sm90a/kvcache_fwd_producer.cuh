// SPDX-License-Identifier: Apache-2.0
// The decode kernel's producer: two warps copy rows of the cache as they are, two prepare their
// scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/attention_args.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"
#include "dsa/kv_layout.h"

namespace dsa::cuda::sm90a {

// What is copied where there is no row: a row of zeros.
__device__ const uint4 kAbsentRow[MlaV32Layout::kTokenBytes / 16] = {};

template <typename Config>
class KvCacheFwdProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // By warp 0 to 3 of the warpgroup; each has half of a tile's rows.
  __device__ KvCacheFwdProducer(SharedStorage& shared, const AttentionArgs& args, int warp)
      : shared_(shared),
        args_(args),
        copies_(warp < Config::kCopyWarps),
        half_(warp % 2),
        lane_(thread_index() % 32) {}

  __device__ void run() {
    if (copies_) {
      copy();
    } else {
      prepare();
    }
  }

 private:
  static constexpr int kRows = Config::kTokens / Config::kCopyWarps;  // of a warp, one a lane
  static_assert(kRows == 32 && Config::kPrepareWarps == Config::kCopyWarps);

  // A lane looks up a row, whose slot was read a tile ahead; one lane copies all of them.
  __device__ void copy() {
    const int begin = shared_.first_tile, end = begin + shared_.tiles;
    auto stage = PipelineState<Config::kStages>::producer_start();
    std::int32_t slot = fetch(begin);
    for (int tile = begin; tile < end; ++tile, stage.advance()) {
      const std::uint8_t* row = shared_.keys.row(args_, key(tile), slot).values;
      const std::uint32_t valid = __ballot_sync(~0u, row != nullptr);
      shared_.rows[half_][lane_] =
          row != nullptr ? row : reinterpret_cast<const std::uint8_t*>(kAbsentRow);
      slot = fetch(tile + 1);
      if (tile == begin + 1) ptx::mbarrier_wait(shared_.full_q, 0);  // without it nothing begins
      ptx::mbarrier_wait(shared_.empty_raw[stage.index], stage.phase);
      __syncwarp();
      if (ptx::elect_one()) {
        ptx::Mbarrier& full = shared_.full_raw[stage.index];
        std::uint8_t* to = shared_.raw[stage.index] + kRows * half_ * Config::kRowBytes;
        shared_.valid[stage.index][half_] = valid;
        ptx::mbarrier_arrive_expect(full, kRows * Config::kRowBytes);
        constexpr int kAtOnce = 8;
#pragma unroll 1
        for (int i = 0; i < kRows; i += kAtOnce) {
          const std::uint8_t* from[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) from[k] = shared_.rows[half_][i + k];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            ptx::bulk_load(to + (i + k) * Config::kRowBytes, from[k], Config::kRowBytes, full);
          }
        }
      }
      __syncwarp();
    }
  }

  __device__ int key(int tile) const { return tile * Config::kTokens + kRows * half_ + lane_; }
  __device__ std::int32_t fetch(int tile) const { return shared_.keys.fetch(args_, key(tile)); }

  // A lane has a row.
  __device__ void prepare() {
    auto stage = PipelineState<Config::kStages>::consumer_start();
    const int token = kRows * half_ + lane_;
    for (int tile = 0; tile < shared_.tiles; ++tile, stage.advance()) {
      ptx::mbarrier_wait(shared_.full_raw[stage.index], stage.phase);
      const auto scales = *reinterpret_cast<const float4*>(
          shared_.raw[stage.index] + token * Config::kRowBytes + Config::kScaleOffset);
      const float each[Config::kGroups] = {scales.x, scales.y, scales.z, scales.w};
      float largest = 0.0f;
#pragma unroll
      for (const float scale : each) largest = fmaxf(largest, fabsf(scale));
      // For V. The largest scale is below 2^exponent. Exponents of what is far outside stay where
      // powers of two of them are numbers.
      const int exponent =
          std::clamp(static_cast<int>(__float_as_uint(largest) >> 23) - 126, -30, 110);
      const float unit = __uint_as_float((127 + Config::kScaleBits - exponent) << 23);
#pragma unroll
      for (int g = 0; g < Config::kGroups; ++g) {
        shared_.scales[stage.index][g][token] = __half_as_ushort(__float2half_rn(each[g] * unit));
      }
      const bool valid = (shared_.valid[stage.index][half_] >> lane_ & 1u) != 0;
      shared_.exponents[stage.index][token] = valid ? exponent : Config::kNoRow;
      // For K. What is divided by must not be 0; what is this small beside the largest, or beside
      // RoPE, may as well be this large.
      const float least = fmaxf(largest * 0x1p-40f, 0x1p-60f);
      const auto at_least = [&](float scale) { return fabsf(scale) < least ? least : scale; };
      const float k[Config::kGroups] = {at_least(each[0]), at_least(each[1]), at_least(each[2]),
                                        at_least(each[3])};
#pragma unroll
      for (int g = 0; g < Config::kGroups; ++g) {
        const float before = g < Config::kSums ? 1.0f : k[g - Config::kSums];
        shared_.ratios[stage.index][g][token] = before / k[g];
      }
      if constexpr (Config::kSums == 2) {
        shared_.ratios[stage.index][Config::kGroups][token] =
            k[Config::kGroups - 2] / k[Config::kGroups - 1];
      }
      shared_.last_scales[stage.index][token] = k[Config::kGroups - 1];
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.full_scales[stage.index]);
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const bool copies_;
  const int half_, lane_;
};

}  // namespace dsa::cuda::sm90a
