// SPDX-License-Identifier: Apache-2.0
// The decode kernel's output: out^T [256 dims, heads] += V^T [256 dims, 64 tokens] P^T, by a
// warpgroup. V^T goes from raw rows through registers: transposed by ldmatrix, e4m3 -> f16, times
// its scale.
#pragma once

#include <cstdint>

#include "core/pipeline_state.h"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"

namespace dsa::cuda::sm90a {

template <typename Config>
class KvCacheFwdValues {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // half: which 256 of the dims.
  __device__ KvCacheFwdValues(SharedStorage& shared, int half)
      : shared_(shared), warp_(threadIdx.x / 32 % 4), lane_(threadIdx.x % 32), half_(half) {}

  __device__ void run(int tiles) {
#pragma unroll
    for (int m = 0; m < Config::kValueTiles; ++m) {
#pragma unroll
      for (float& x : out_[m]) x = 0.0f;
    }
    auto stage = PipelineState<Config::kStages>::consumer_start();
    auto buffer = PipelineState<2>::consumer_start();
    for (int tile = 0; tile < tiles; ++tile, stage.advance(), buffer.advance()) {
      ptx::mbarrier_wait(shared_.full_raw[stage.index], stage.phase);
      ptx::mbarrier_wait(shared_.full_scales[stage.index], stage.phase);
      ptx::mbarrier_wait(shared_.full_p[buffer.index], buffer.phase);
      if (shared_.rescales[buffer.index] != 0) rescale(shared_.rescale[buffer.index]);
      multiply(stage.index, buffer.index);
      __syncwarp();
      if (lane_ == 0) {
        ptx::mbarrier_arrive(shared_.empty_raw[stage.index]);
        ptx::mbarrier_arrive(shared_.empty_p[buffer.index]);
      }
    }
  }

  // store(head, dim, x0, x1): of two neighbouring dims.
  template <typename Store>
  __device__ void store_out(Store&& store) const {
#pragma unroll
    for (int j = 0; j < Config::kHeads / 8; ++j) {
      const int head = 8 * j + lane_ % 4 * 2;
      const float2 factor = *reinterpret_cast<const float2*>(&shared_.out_factor[head]);
#pragma unroll
      for (int m = 0; m < Config::kValueTiles; ++m) {
        const int dim = first_dim(m) + lane_ / 4 * 2;
        const float* x = &out_[m][4 * j];
        store(head, dim, x[0] * factor.x, x[2] * factor.x);
        store(head + 1, dim, x[1] * factor.y, x[3] * factor.y);
      }
    }
  }

 private:
  static constexpr int kTileTokens = 32;  // of a step

  // Of this warp's part of 64 dims.
  __device__ int first_dim(int m) const {
    return (half_ * Config::kValueTiles + m) * 64 + warp_ * 16;
  }

  __device__ void rescale(const float* factors) {
#pragma unroll
    for (int j = 0; j < Config::kHeads / 8; ++j) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + 8 * j + lane_ % 4 * 2);
#pragma unroll
      for (int m = 0; m < Config::kValueTiles; ++m) {
        out_[m][4 * j] *= factor.x;
        out_[m][4 * j + 1] *= factor.y;
        out_[m][4 * j + 2] *= factor.x;
        out_[m][4 * j + 3] *= factor.y;
      }
    }
  }

  __device__ void multiply(int stage, int buffer) {
    const std::uint32_t raw =
        ptx::shared_address(shared_.raw[stage]) + lane_ * Config::kRowBytes + first_dim(0);
    const ptx::WgmmaDescriptor<128> p(shared_.p[buffer]);
    constexpr int kSteps = Config::kTokens / kTileTokens * Config::kValueTiles;
    OperandPair operands[2];
    std::uint32_t codes[2][4];
    std::uint32_t scales[4];
    const auto load = [&](int step) {
      const int m = step % Config::kValueTiles, tokens = step / Config::kValueTiles * kTileTokens;
      ptx::ldmatrix_x4_trans(codes[step % 2], raw + tokens * Config::kRowBytes + m * 64);
    };
    load(0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int m = step % Config::kValueTiles, tokens = step / Config::kValueTiles * kTileTokens;
      if (step + 1 < kSteps) load(step + 1);
      if (m * 64 % Config::kGroup == 0) {
        const int group = (half_ * Config::kValueTiles + m) * 64 / Config::kGroup;
        const auto* pairs = reinterpret_cast<const std::uint32_t*>(
            &shared_.scales[stage][group][tokens + lane_ % 4 * 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = pairs[4 * i];
      }
      OperandPair& a = operands[step % 2];
      ptx::wgmma_wait<1>();
      if (step >= 2) a.keep();
      const std::uint32_t (&c)[4] = codes[step % 2];
      // Two dims of two tokens -> two tokens of each dim.
      const auto widen = [&](std::uint32_t word, std::uint32_t scale, std::uint32_t& even,
                             std::uint32_t& odd) {
        const uint2 wide = ptx::f16x4_from_e4m3x4(__byte_perm(word, 0, 0x3120));
        even = times<__half>(wide.x, scale);
        odd = times<__half>(wide.y, scale);
      };
      widen(c[0], scales[0], a.first[0], a.first[1]);
      widen(c[1], scales[1], a.first[2], a.first[3]);
      widen(c[2], scales[2], a.second[0], a.second[1]);
      widen(c[3], scales[3], a.second[2], a.second[3]);
      ptx::wgmma_fence();
      ptx::wgmma_16_bit<__half>(out_[m], a.first, p + tokens * 2, true);
      ptx::wgmma_16_bit<__half>(out_[m], a.second, p + (tokens + 16) * 2, true);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Config::kValueTiles; ++m) ptx::wgmma_result(out_[m]);
    operands[0].keep();
    operands[1].keep();
  }

  SharedStorage& shared_;
  const int warp_, lane_, half_;
  float out_[Config::kValueTiles][Config::kHeads / 2];
};

}  // namespace dsa::cuda::sm90a
