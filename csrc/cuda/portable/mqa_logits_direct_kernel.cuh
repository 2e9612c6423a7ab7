// SPDX-License-Identifier: Apache-2.0
// Indexer logits by mma.sync, flat and paged (SM80), where up to two warps need the same keys, as
// in decoding: a warp reads keys for itself, makes them into fragments in registers, and waits for
// no other warp.
//
// Tile: blocks of 32 keys a warp; 64 head rows a warp. The 8 warps of a CTA are warps_q x warps_k:
//   warps_q sets of queries; the blocks of the chunk go to the warps_k warps in turn.
// Registers: those of MqaScores, up to 255 in all. One CTA an SM.
// Shared memory: sizeof(SharedStorage), up to 99 KiB: three blocks a warp, keys as they are and
//   scales. Two of them, 64 KiB a CTA, are on their way while one is worked on.
// Protocol: a lane reads the keys that it copied; scales are of other lanes of the warp.
#pragma once

#include <cstdint>

#include "cuda/portable/mqa_logits_scores.cuh"

namespace dsa::cuda {

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
class MqaLogitsDirect {
 public:
  using Scores = MqaScores<ProductsOf, kHeadDim, kHeads, Keys>;
  using Products = typename Scores::Products;
  using Unit = typename Scores::Unit;
  static constexpr int kStages = 3;

  struct SharedStorage {
    Unit keys[MqaTile::kWarps][kStages][Scores::kTiles][Unit::kUnits][32];
    float scale[MqaTile::kWarps][kStages][MqaTile::kBlockKeys];
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "what a CTA has on SM86 and SM89");
  static_assert(MqaTile::kBlockKeys == 32, "a lane looks up a key");

  __device__ __forceinline__ MqaLogitsDirect(const MqaCta<Keys>& cta, SharedStorage& shared)
      : cta_(cta), shared_(shared), scores_(cta, cta.warp & ((1 << cta.task.warps_q_log2) - 1)) {}

  __device__ __forceinline__ void run() {
    const KeyWindow seen = scores_.warp_window();
    const int warps_q_log2 = cta_.task.warps_q_log2;
    const std::uint32_t step = (MqaTile::kWarps >> warps_q_log2) * MqaTile::kBlockKeys;
    const std::uint32_t begin = seen.begin + (cta_.warp >> warps_q_log2) * MqaTile::kBlockKeys;
    end_ = seen.end;
    if (begin < end_) {
      look_up(begin);
      unsigned mapped = copy_block(begin, 0, step);
      scores_.load_queries();
      unsigned next_mapped = copy_block(begin + step, 1, step);
      int stage = 0;
#pragma unroll 1
      for (std::uint32_t first = begin; first < end_; first += step) {
        __syncwarp();  // the scales of the block before last are read
        const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
        const unsigned last_mapped = copy_block(first + 2 * step, free_stage, step);
        ptx::cp_async_wait<2>();
        __syncwarp();
        score_block(first, stage, mapped);
        mapped = next_mapped;
        next_mapped = last_mapped;
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
      scores_.flush(Write{scores_});
    }
    if (cta_.task.clean) cta_.clear_outside_windows();
  }

 private:
  struct Write {
    const Scores& scores;
    __device__ __forceinline__ void operator()(std::uint32_t key, float sum, KeyInfo info) const {
      scores.write(key, sum, info);
    }
  };

  // Of this lane's key of the block at `first`. No key from end_ on is read.
  __device__ __forceinline__ void look_up(std::uint32_t first) {
    const std::uint32_t key = first + cta_.lane;
    entry_ = key < end_ ? cta_.task.keys.look_up(cta_.group, key) : -1;
  }

  // A block, which was looked up, to a stage; looks up the next one. Returns a bit for each key in
  // a valid page.
  __device__ __forceinline__ unsigned copy_block(std::uint32_t first, int stage,
                                                 std::uint32_t step) {
    const std::uint32_t key = first + cta_.lane;
    KeyAddress address;
    if (key < end_) address = cta_.task.keys.locate(entry_, key);
    look_up(first + step);
    const unsigned mapped = __ballot_sync(~0u, address.values != nullptr);
    const std::int32_t alignment = cta_.task.key_alignment;
#pragma unroll
    for (int n = 0; n < Scores::kTiles; ++n) {
      const int of = n * 8 + cta_.lane / 4;  // the lane of this lane's key
      const auto values = __shfl_sync(
          ~0u, static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(address.values)),
          of);
      copy_row<kHeadDim, 32>(&shared_.keys[cta_.warp][stage][n][0][cta_.lane],
                             reinterpret_cast<const std::uint8_t*>(values), cta_.lane % 4,
                             values != 0, alignment);
    }
    copy_float(&shared_.scale[cta_.warp][stage][cta_.lane], address.scale,
               address.values != nullptr, alignment);
    ptx::cp_async_commit();
    return mapped;
  }

  __device__ __forceinline__ void score_block(std::uint32_t first, int stage, unsigned mapped) {
    scores_.score(
        first,
        [&](int n, typename Scores::Fragments& b) {
#pragma unroll
          for (int u = 0; u < Unit::kUnits; ++u) {
            std::uint32_t f[Products::kUnitSteps][2];
            Products::fragments(shared_.keys[cta_.warp][stage][n][u][cta_.lane], f);
#pragma unroll
            for (int i = 0; i < Products::kUnitSteps; ++i) {
              b[u * Products::kUnitSteps + i][0] = f[i][0];
              b[u * Products::kUnitSteps + i][1] = f[i][1];
            }
          }
        },
        [&](int key) {
          return KeyInfo{shared_.scale[cta_.warp][stage][key],
                         !Keys::kMayMiss || (mapped >> key & 1) != 0};
        },
        [] {}, Write{scores_});
  }

  const MqaCta<Keys>& cta_;
  SharedStorage& shared_;
  Scores scores_;
  std::uint32_t end_ = 0;  // of the keys that the warp reads
  std::int32_t entry_ = -1;
};

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
__global__ void __launch_bounds__(MqaTile::kThreads, 1)
    portable_mqa_logits_direct_kernel(const __grid_constant__ MqaTask<Keys> task) {
  using Logits = MqaLogitsDirect<ProductsOf, kHeadDim, kHeads, Keys>;
  extern __shared__ __align__(16) unsigned char shared[];
  const MqaCta<Keys> cta(task);
  Logits(cta, *reinterpret_cast<typename Logits::SharedStorage*>(shared)).run();
}

}  // namespace dsa::cuda
