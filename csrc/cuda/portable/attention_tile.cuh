// SPDX-License-Identifier: Apache-2.0
// One CTA's softmax and output, tile by tile: QK, maxima, probabilities, PV. Roles, registers and
// the order of the steps: attention_kernel.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/portable/attention_fragments.cuh"
#include "cuda/ptx/arithmetic.cuh"

namespace dsa::cuda {

// [kHeads, kTokens] probabilities, swizzled like the tile; 16-byte chunk `chunk` of row `row`.
template <int kTokens>
__device__ __forceinline__ std::uint32_t p_offset(int row, int chunk) {
  if constexpr (kTokens == 64) {
    return static_cast<std::uint32_t>(row * 128 + ((chunk ^ row) & 7) * kChunk);
  } else {
    static_assert(kTokens == 32);
    return static_cast<std::uint32_t>(row * 64 + ((chunk ^ (row >> 1)) & 3) * kChunk);
  }
}

// The state of one CTA's softmax and output, from tile to tile.
template <typename Config>
class AttentionTile {
 public:
  using QueryElement = typename Config::QueryElement;
  using ValueElement = typename Config::ValueElement;
  using SharedStorage = typename Config::SharedStorage;
  using Statistics = typename Config::Statistics;
  static constexpr int kMTiles = Config::kMTiles;
  static constexpr int kNTiles = Config::kNTiles;
  using Scores = float[kMTiles][kNTiles][4];
  using Fragments = QkFragments<Config>;
  using PairScores = typename Fragments::Sums;  // of this warp's keys and its neighbour's

  __device__ AttentionTile(SharedStorage& shared, const AttentionArgs& args)
      : shared_(shared),
        scale_log2_(args.scale_log2),
        d_v_(args.d_v),
        blocks_((args.d_qk + kDimBlock - 1) / kDimBlock),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {
#pragma unroll
    for (int i = 0; i < 2 * kMTiles; ++i) {
      max_[i] = -kAttentionInf;
      sum_[i] = weight_[i] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < Config::kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[r][c][e] = 0.0f;
      }
    }
  }

  // Whether this warp takes part in QK and softmax.
  __device__ bool has_keys() const {
    return Config::kQkWarps == Config::kWarps || warp_ < Config::kQkWarps;
  }

  // The largest scale of each group so far, where probabilities depend on it. A warp has one group
  // of 32 keys.
  __device__ void note_scales(int stage) {
    if constexpr (Config::kIsV32) {
      constexpr int kParts = Config::kTokens / 32;
      static_assert(kParts * Config::kGroups <= Config::kWarps);
      const int group = warp_ / kParts;
      if (group >= Config::kGroups) return;
      const float scale =
          scale_of<Config>(shared_.scales[stage], warp_ % kParts * 32 + lane_, group);
      const unsigned exponent = __reduce_max_sync(~0u, __float_as_uint(scale) >> 23 & 0xFFu);
      if (lane_ == 0) atomicMax(&shared_.scale_exponent[group], static_cast<int>(exponent));
    }
  }

  // scores = q . k of the tile, in fp32, scales applied. Calls between(part) with each part of a
  // row that the next tile's copies have.
  template <typename Between>
  __device__ void multiply_qk(int stage, const Between& between) {
    forget_addresses();
    constexpr int kChains = Config::kChains;
    const Fragments fragments(shared_, stage, warp_head(), pair_key(), warp_ % 2, lane_);
    PairScores sums;
    clear(sums);
    if constexpr (Config::kIsFp8) {
#pragma unroll 1
      for (int group = 0; group < Config::kGroups; group += kChains) {
#pragma unroll
        for (int c = 0; c < kChains; ++c) {
          if (group + c < Config::kRowParts - 1) between(group + c);
        }
        PairScores acc[kChains];
#pragma unroll
        for (int c = 0; c < kChains; ++c) clear(acc[c]);
#pragma unroll
        for (int c = 0; c < kChains; ++c) fragments.multiply_group(group + c, acc[c]);
#pragma unroll
        for (int c = 0; c < kChains; ++c) add_scaled(acc[c], stage, group + c, sums);
      }
      between(Config::kRowParts - 1);
      multiply_by_q_factor(sums);
      fragments.template multiply_block<QueryElement>(Config::kNope / kDimBlock, 0, sums);
    } else {
      constexpr int kMaxBlocks = kMaxDimQk / kDimBlock;
      PairScores odd;
      clear(odd);
#pragma unroll
      for (int block = 0; block < kMaxBlocks; ++block) {
        if (block >= blocks_) break;
        between(block);
        fragments.template multiply_block<QueryElement>(block, block,
                                                        kChains > 1 && block % 2 == 1 ? odd : sums);
      }
      if constexpr (kChains > 1) add(odd, sums);
    }
    exchange_halves(sums);
  }

  // The tile's maxima of this warp's heads, over this warp's keys; masks invalid keys.
  __device__ void publish_maxima(int tile) {
    forget_addresses();
    const std::uint8_t* valid = shared_.valid[tile & 1];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      float largest[2] = {-kAttentionInf, -kAttentionInf};
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        const uchar2 ok = *reinterpret_cast<const uchar2*>(valid + key_of(n));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& s0 = scores_[m][n][2 * half];
          float& s1 = scores_[m][n][2 * half + 1];
          s0 = ok.x ? s0 * scale_log2_ : -kAttentionInf;
          s1 = ok.y ? s1 * scale_log2_ : -kAttentionInf;
          largest[half] = fmaxf(largest[half], fmaxf(s0, s1));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = largest[half];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        if (lane_ % 4 == 0) shared_.row_max[warp_ % Config::kWarpsN][head_of(m, half)] = x;
      }
    }
  }

  // Probabilities to shared memory, and what older output has to be multiplied by.
  __device__ void publish_probabilities(int tile, int stage) {
    forget_addresses();
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      float base[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * m + half;
        const int head = head_of(m, half);
        float largest = shared_.row_max[0][head];
#pragma unroll
        for (int w = 1; w < Config::kWarpsN; ++w) {
          largest = fmaxf(largest, shared_.row_max[w][head]);
        }
        max_[i] = fmaxf(max_[i], largest);
        float alpha = 1.0f;
        base[half] = shared_.base[tile & 1][head];
        if (largest - base[half] > kLazyRescale) {
          alpha = ptx::exp2_approx(base[half] - largest);
          base[half] = largest;
          sum_[i] *= alpha;
          weight_[i] *= alpha;
        }
        if (warp_ % Config::kWarpsN == 0 && lane_ % 4 == 0) {
          shared_.alpha[head] = alpha;
          shared_.base[~tile & 1][head] = base[half];
        }
        // While all scores are -inf, any finite base gives p = 0.
        if (base[half] == -kAttentionInf) base[half] = 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float p0 = ptx::exp2_approx(scores_[m][n][2 * half] - base[half]);
          const float p1 = ptx::exp2_approx(scores_[m][n][2 * half + 1] - base[half]);
          sum_[2 * m + half] += p0 + p1;
          if constexpr (!Config::kIsV32) {
            const std::uint32_t packed = pack<ValueElement>(p0, p1);
            const float2 rounded = unpack<ValueElement>(packed);
            weight_[2 * m + half] += rounded.x + rounded.y;
            store_p(0, head_of(m, half), key_of(n), packed);
          } else {
            scores_[m][n][2 * half] = p0;
            scores_[m][n][2 * half + 1] = p1;
          }
        }
      }
    }
    if constexpr (Config::kIsV32) store_scaled_probabilities(stage);
  }

  // out = out * alpha + p . v
  __device__ void multiply_pv(int stage) {
    forget_addresses();
    if (column() >= d_v()) return;
    const int group = Config::kIsV32 ? column() / Config::kGroup : 0;
    rescale(group);
    const std::uint32_t p_base = ptx::shared_address(shared_.p[group]);
    const ValueFragments<Config> values(shared_, stage, column(), lane_);
#pragma unroll
    for (int k = 0; k < Config::kTokens; k += 16) {
      std::uint32_t a[Config::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < Config::kRowTiles; ++r) {
        ptx::ldmatrix_x4(
            a[r], p_base + p_offset<Config::kTokens>(16 * r + lane_ % 16, k / 8 + lane_ / 16));
      }
#pragma unroll
      for (int block = 0; block < Config::kColumns / kDimBlock; ++block) {
        // Dimensions come in blocks of 64: whole or not at all.
        if (block > 0 && column() + block * kDimBlock >= d_v()) break;
        values.load_block(k, block, [&](int c, std::uint32_t b0, std::uint32_t b1) {
#pragma unroll
          for (int r = 0; r < Config::kRowTiles; ++r) {
            ptx::mma_16816<ValueElement>(out_[r][8 * block + c], a[r], b0, b1);
          }
        });
      }
    }
  }

  // The heads' statistics, in the place of p. Begins and ends with a barrier.
  __device__ const Statistics& publish_statistics(int end_tile) {
    __syncthreads();
    auto& statistics = reinterpret_cast<Statistics&>(shared_.p);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * m + half;
        float sum = sum_[i], weight = Config::kIsV32 ? sum_[i] : weight_[i];
#pragma unroll
        for (int step = 1; step <= 2; ++step) {
          sum += __shfl_xor_sync(~0u, sum, step);
          weight += __shfl_xor_sync(~0u, weight, step);
        }
        if (lane_ % 4 != 0 || !has_keys()) continue;
        const int head = head_of(m, half);
        statistics.sum[warp_ % Config::kWarpsN][head] = sum;
        statistics.weight[warp_ % Config::kWarpsN][head] = weight;
        if (warp_ % Config::kWarpsN == 0) {
          statistics.base[head] = shared_.base[end_tile & 1][head];
          statistics.max[head] = max_[i];
        }
      }
    }
    __syncthreads();
    return statistics;
  }

  // store(head, column, x0, x1) for every pair of neighbouring columns of the output times alpha.
  template <typename Store>
  __device__ void store_out(const Store& store) const {
    // Apart: their product may not be finite where the result is.
    float unit = 1.0f, scale = 1.0f;
    if constexpr (Config::kIsV32) {
      unit = 1.0f / Config::kProbabilityUnit;
      scale = power_of_two(scale_exponent_);
    }
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = 16 * r + 8 * half + lane_ / 4;
        const float f = shared_.alpha[head] * unit;
        const auto times_f = [&](float x) { return f < 0.0f ? 0.0f : x * f * scale; };
#pragma unroll
        for (int c = 0; c < Config::kColumnTiles; c += 2) {
          const int first = column() + 8 * c;
          if (first >= d_v()) break;
          const float x[2] = {times_f(out_[r][c][2 * half]), times_f(out_[r][c][2 * half + 1])};
          const float y[2] = {times_f(out_[r][c + 1][2 * half]),
                              times_f(out_[r][c + 1][2 * half + 1])};
          // Two products of 8 columns, or of the even and the odd of 16: ValueFragments.
          if (Config::holds_codes(first)) {
            store(head, first + lane_ % 4 * 4, x[0], y[0]);
            store(head, first + lane_ % 4 * 4 + 2, x[1], y[1]);
          } else {
            store(head, first + lane_ % 4 * 2, x[0], x[1]);
            store(head, first + lane_ % 4 * 2 + 8, y[0], y[1]);
          }
        }
      }
    }
  }

 private:
  // An 8-bit cache fixes its dimensions.
  __device__ int d_v() const { return Config::kIsFp8 ? kMaxDimV : d_v_; }

  // Scores move on by this much (in powers of two) before output and sums are rescaled to them.
  static constexpr float kLazyRescale = 8.0f;

  // What follows from the lane and the warp is worked out anew from here on: kept from step to step
  // of a tile it would cost the products' registers.
  __device__ void forget_addresses() { asm volatile("" : "+r"(warp_), "+r"(lane_)); }

  // QK: the first of this warp's heads and keys. PV: of its columns.
  __device__ int warp_head() const { return warp_ / Config::kWarpsN * kMTiles * 16; }
  __device__ int warp_key() const { return warp_ % Config::kWarpsN * kNTiles * 8; }
  __device__ int column() const { return warp_ * Config::kColumns; }
  // The first key of this warp and its neighbour.
  __device__ int pair_key() const { return warp_key() - warp_ % 2 * kNTiles * 8; }

  // scores = own sums + the neighbour's, for this warp's keys. Through p, which is free now: first
  // the odd warps' sums of the even ones' keys, then the reverse in the same place.
  __device__ void exchange_halves(const PairScores& sums) {
    constexpr int kPerLane = kMTiles * kNTiles;
    constexpr int kPairs = Config::kQkWarps / 2;
    static_assert(kPairs * kPerLane * 32 * sizeof(float4) <= sizeof(SharedStorage::p));
    float4* mail = reinterpret_cast<float4*>(shared_.p) + warp_ / 2 * kPerLane * 32 + lane_;
    const bool odd = warp_ % 2 == 1;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores_[m][n][e] = odd ? sums[m][kNTiles + n][e] : sums[m][n][e];
        }
      }
    }
    const auto send = [&](int first) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          const float* x = sums[m][first + n];
          mail[(m * kNTiles + n) * 32] = {x[0], x[1], x[2], x[3]};
        }
      }
    };
    const auto receive = [&] {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          const float4 x = mail[(m * kNTiles + n) * 32];
          scores_[m][n][0] += x.x;
          scores_[m][n][1] += x.y;
          scores_[m][n][2] += x.z;
          scores_[m][n][3] += x.w;
        }
      }
    };
    if (odd) send(0);
    pair_barrier();
    if (!odd) {
      receive();
      send(kNTiles);
    }
    pair_barrier();
    if (odd) receive();
  }

  // Orders shared memory between a warp and its neighbour. Barrier 0 is __syncthreads.
  __device__ void pair_barrier() const {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + warp_ / 2) : "memory");
  }

  __device__ int head_of(int m, int half) const {
    return warp_head() + 16 * m + 8 * half + lane_ / 4;
  }
  __device__ int key_of(int n) const { return warp_key() + 8 * n + lane_ % 4 * 2; }

  __device__ static void clear(PairScores& x) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0.0f;
      }
    }
  }

  __device__ static void add(const PairScores& x, PairScores& sums) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] += x[m][n][e];
      }
    }
  }

  // sums += acc times its keys' scales.
  __device__ void add_scaled(const PairScores& acc, int stage, int group, PairScores& sums) const {
#pragma unroll
    for (int n = 0; n < 2 * kNTiles; ++n) {
      const int key = pair_key() + 8 * n + lane_ % 4 * 2;
      const float scale[2] = {scale_of<Config>(shared_.scales[stage], key, group),
                              scale_of<Config>(shared_.scales[stage], key + 1, group)};
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[m][n][e] = fmaf(acc[m][n][e], scale[e % 2], sums[m][n][e]);
        }
      }
    }
  }

  // What narrow_queries() divided q by.
  __device__ void multiply_by_q_factor(PairScores& sums) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = shared_.q_factor[head_of(m, half)];
#pragma unroll
        for (int n = 0; n < 2 * kNTiles; ++n) {
          sums[m][n][2 * half] *= factor;
          sums[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }

  __device__ void store_p(int group, int head, int key, std::uint32_t packed) {
    const std::uint32_t at = p_offset<Config::kTokens>(head, key / 8) + key % 8 * 2;
    *reinterpret_cast<std::uint32_t*>(shared_.p[group] + at) = packed;
  }

  // 2^(exponent - 127) of an fp32 exponent field, which is kept in 1..253 so that its inverse is a
  // normal number too.
  __device__ static int bounded(int exponent) { return max(1, min(exponent, 253)); }
  __device__ static float power_of_two(int exponent) { return __int_as_float(exponent << 23); }

  // For each group the probabilities times the keys' scales, relative to the largest scale so far:
  // f16 then holds them.
  __device__ void store_scaled_probabilities(int stage) {
    float unit[Config::kGroups];
#pragma unroll
    for (int g = 0; g < Config::kGroups; ++g) {
      unit[g] = Config::kProbabilityUnit * power_of_two(254 - bounded(shared_.scale_exponent[g]));
    }
    const auto* scales = reinterpret_cast<const float4*>(shared_.scales[stage]);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float4 key0 = scales[key_of(n)], key1 = scales[key_of(n) + 1];
      const float scale0[] = {key0.x, key0.y, key0.z, key0.w};
      const float scale1[] = {key1.x, key1.y, key1.z, key1.w};
#pragma unroll
      for (int g = 0; g < Config::kGroups; ++g) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            store_p(g, head_of(m, half), key_of(n),
                    pack<ValueElement>(scores_[m][n][2 * half] * (scale0[g] * unit[g]),
                                       scores_[m][n][2 * half + 1] * (scale1[g] * unit[g])));
          }
        }
      }
    }
  }

  // Brings the output up to the softmax's base and, for V3.2, to the largest scale.
  __device__ void rescale(int group) {
    float unit = 1.0f;
    if constexpr (Config::kIsV32) {
      const int exponent = bounded(shared_.scale_exponent[group]);
      unit = power_of_two(max(127 + scale_exponent_ - exponent, 0));
      scale_exponent_ = exponent;
    }
    float alpha[Config::kRowTiles][2];
    bool any = unit != 1.0f;
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        alpha[r][half] = shared_.alpha[16 * r + 8 * half + lane_ / 4];
        any = any || alpha[r][half] != 1.0f;
      }
    }
    if (!__any_sync(~0u, any)) return;
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
#pragma unroll
      for (int c = 0; c < Config::kColumnTiles; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[r][c][e] *= alpha[r][e / 2] * unit;
      }
    }
  }

  SharedStorage& shared_;
  float scale_log2_;
  int d_v_;
  int blocks_;  // of 64 dims in d_qk
  int warp_, lane_;
  int scale_exponent_ = 1;  // that the output is relative to
  Scores scores_;
  float max_[2 * kMTiles], sum_[2 * kMTiles], weight_[2 * kMTiles];
  float out_[Config::kRowTiles][Config::kColumnTiles][4];
};

}  // namespace dsa::cuda
