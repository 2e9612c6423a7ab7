// SPDX-License-Identifier: Apache-2.0
// The decode kernel's producer: two warps copy rows of the cache as they are, two prepare their
// scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/attention_args.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/special_registers.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"
#include "dsa/kv_layout.h"

namespace dsa::cuda::sm90a {

// What is copied where there is no row, zeros: a row for each lane, since what all SMs read at once
// must not be in one place of L2.
__device__ const uint4 kAbsentRows[32][MlaV32Layout::kTokenBytes / 16] = {};

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
        lane_(ptx::thread_index() % 32) {}

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
      const KeyRow row = shared_.keys.row(args_, key(tile), slot);
      const std::uint32_t valid = __ballot_sync(~0u, row.values != nullptr);
      shared_.rows[half_][lane_] = row.values != nullptr
                                       ? row.values
                                       : reinterpret_cast<const std::uint8_t*>(kAbsentRows[lane_]);
      slot = fetch(tile + 1);
      if (tile == begin + 1) ptx::mbarrier_wait(shared_.full_q, 0);  // without it nothing begins
      ptx::mbarrier_wait(shared_.empty_raw[stage.index], stage.phase);
      __syncwarp();
      if constexpr (!Config::kIsV32) {
        std::uint64_t& codes = shared_.scales[stage.index].codes[kRows * half_ + lane_];
        ptx::cp_async_or_zeros<8>(ptx::shared_address(&codes), row.scales, row.scales != nullptr);
        ptx::mbarrier_arrive_after_cp_async(shared_.full_raw[stage.index]);
      }
      if (ptx::elect_one()) {
        ptx::Mbarrier& full = shared_.full_raw[stage.index];
        std::uint8_t* to = shared_.raw[stage.index] + kRows * half_ * Config::kRowPitch;
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
            ptx::bulk_load(to + (i + k) * Config::kRowPitch, from[k], Config::kRowBytes, full);
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
      const std::uint8_t* row = shared_.raw[stage.index] + token * Config::kRowPitch;
      auto& to = shared_.scales[stage.index];
      float scales[Config::kGroups];
      load_scales(row, to, token, scales);
      float largest = 0.0f;
#pragma unroll
      for (const float scale : scales) largest = fmaxf(largest, fabsf(scale));
      // The largest scale is below 2^exponent.
      const int exponent = std::clamp(static_cast<int>(__float_as_uint(largest) >> 23) - 126,
                                      int{Config::kLeastExponent}, int{Config::kMostExponent});
      const float unit = __uint_as_float((127 + Config::kScaleBits - exponent) << 23);
#pragma unroll
      for (int g = 0; g < Config::kGroups; ++g) {
        to.f16[g][token] = __half_as_ushort(__float2half_rn(scales[g] * unit));
      }
      const bool valid = (shared_.valid[stage.index][half_] >> lane_ & 1u) != 0;
      shared_.exponents[stage.index][token] = valid ? exponent : Config::kNoRow;
      prepare_k(to, token, scales, largest, exponent);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(shared_.full_scales[stage.index]);
    }
  }

  using V32Scales = typename Config::V32Scales;
  using V4Scales = typename Config::V4Scales;

  __device__ static void load_scales(const std::uint8_t* row, const V32Scales&, int,
                                     float (&scales)[Config::kGroups]) {
    constexpr int kOffset = static_cast<int>(MlaV32Layout::scales(0));
    const auto four = *reinterpret_cast<const float4*>(row + kOffset);
    const float each[] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int g = 0; g < Config::kGroups; ++g) scales[g] = each[g];
  }

  __device__ static void load_scales(const std::uint8_t*, const V4Scales& from, int token,
                                     float (&scales)[Config::kGroups]) {
    constexpr std::uint32_t kNanCode = 255;
    const std::uint64_t codes = from.codes[token];
#pragma unroll
    for (int g = 0; g < Config::kGroups; ++g) {
      const auto code = static_cast<std::uint32_t>(codes >> 8 * g) & 255u;
      scales[g] = code == kNanCode ? NAN : __uint_as_float(code << 23);  // 2^-127 becomes 0
    }
  }

  // ratios[g]: what a sum with group g's products is multiplied by before it gets those of the next
  // group of the same sum, g + kSums, or of RoPE, whose scale is 1, or the other sum. What is
  // divided by must not be 0; what is this small beside the largest, or beside RoPE, may as well be
  // this large.
  __device__ static void prepare_k(V32Scales& to, int token, const float (&scales)[Config::kGroups],
                                   float largest, int) {
    constexpr int kGroups = Config::kGroups, kSums = Config::kSums;
    const float least = fmaxf(largest * 0x1p-40f, 0x1p-60f);
    float k[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) k[g] = fabsf(scales[g]) < least ? least : scales[g];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      to.ratios[g][token] = g + kSums < kGroups ? k[g] / k[g + kSums] : k[g];
    }
  }

  __device__ static void prepare_k(V4Scales& to, int token, const float (&)[Config::kGroups], float,
                                   int exponent) {
    to.of_scores[token] = __uint_as_float((127 - Config::kScaleBits + exponent) << 23);
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const bool copies_;
  const int half_, lane_;
};

}  // namespace dsa::cuda::sm90a
