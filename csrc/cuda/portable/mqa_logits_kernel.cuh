// SPDX-License-Identifier: Apache-2.0
// Indexer logits by mma.sync, flat and paged (SM80), where several warps need the same keys: the
// keys are read and made into fragments once a CTA.
//
// Tile: 64 keys; 64 head rows a warp, 8 warps. Warps without rows only help with the keys.
// Registers: those of MqaScores, up to 255 in all. One CTA an SM.
// Shared memory: sizeof(SharedStorage), up to 54 KiB: two stages of keys as fragments (D = 128:
//   f16, 256 bytes each), two tiles of keys as they are, scales, and the partial sums of warps that
//   share a query.
// Protocol: in iteration i a thread starts copying its part of tile i + 2, waits for its own copies
//   of tile i + 1, and makes fragments of them in stage (i + 1) % 2, while its warp works on stage
//   i % 2. The barrier that ends an iteration publishes what was stored and frees what was read.
//   Scales are copied to where they are read: there are four stages of them.
#pragma once

#include <cstdint>

#include "cuda/portable/mqa_logits_scores.cuh"

namespace dsa::cuda {

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
class MqaLogits {
 public:
  using Scores = MqaScores<ProductsOf, kHeadDim, kHeads, Keys>;
  using Products = typename Scores::Products;
  using Unit = typename Scores::Unit;
  static constexpr int kSteps = Scores::kSteps;
  static constexpr int kLaneChunks = (kSteps + 1) / 2;  // 16 bytes: the B fragments of two k-steps
  static constexpr int kUnitChunks = kLaneChunks / Unit::kUnits;
  static constexpr bool kPartial = Scores::kWarpsPerQuery == 2;

  struct SharedStorage {
    uint4 fragments[2][MqaTile::kKeys][kLaneChunks * 4];
    Unit raw[2][Unit::kUnits][MqaTile::kThreads];  // each thread reads what it copied
    float scale[4][MqaTile::kKeys];
    bool mapped[4][Keys::kMayMiss ? MqaTile::kKeys : 1];
    float partial[2][kPartial ? MqaTile::kWarps : 1][MqaTile::kKeys];
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "what a CTA has on SM86 and SM89");

  __device__ __forceinline__ MqaLogits(const MqaCta<Keys>& cta, SharedStorage& shared)
      : cta_(cta), shared_(shared), scores_(cta, cta.warp) {}

  __device__ __forceinline__ void run() {
    if (cta_.task.clean) cta_.clear_outside_windows();
    const KeyWindow seen = cta_.span(
        cta_.lane < cta_.task.cta_rows ? cta_.window(cta_.first_row + cta_.lane) : KeyWindow{});
    if (seen.begin >= seen.end) return;
    end_ = seen.end;

    look_up(seen.begin);
    copy_tile(seen.begin, 0);
    copy_tile(seen.begin + MqaTile::kKeys, 1);
    scores_.load_queries();
    ptx::cp_async_wait<1>();
#pragma unroll
    for (int u = 0; u < Unit::kUnits; ++u) make_fragments(0, u);
    __syncthreads();
    unsigned i = 0;
#pragma unroll 1
    for (std::uint32_t first = seen.begin; first < end_; first += MqaTile::kKeys, ++i) {
      copy_tile(first + 2 * MqaTile::kKeys, i + 2);
      ptx::cp_async_wait<1>();
#pragma unroll 1
      for (int block = 0; block < MqaTile::kBlocks; ++block) score_block(first, i, block);
      if constexpr (kPartial) {
        scores_.flush(Emit{*this, first, i});
        __syncthreads();
        add_partial_sums(first, i);
      } else {
        __syncthreads();
      }
    }
    if constexpr (!kPartial) scores_.flush(Emit{*this, 0, i});
  }

 private:
  // Where the sums of a warp go: of tile i, at `first`, where sums are partial.
  struct Emit {
    MqaLogits& logits;
    std::uint32_t first;
    unsigned i;

    __device__ __forceinline__ void operator()(std::uint32_t key, float sum, KeyInfo info) const {
      if constexpr (kPartial) {
        if (key - first >= MqaTile::kKeys) return;  // no key
        logits.shared_.partial[i % 2][logits.cta_.warp][key - first] = sum;
      } else {
        logits.scores_.write(key, sum, info);
      }
    }
  };

  // Of this thread's key of the tile at `first`. No key from end_ on is read.
  __device__ __forceinline__ void look_up(std::uint32_t first) {
    const std::uint32_t key = first + threadIdx.x / 4;
    entry_ = key < end_ ? cta_.task.keys.look_up(cta_.group, key) : -1;
  }

  // Tile i, which was looked up.
  __device__ __forceinline__ void copy_tile(std::uint32_t first, unsigned i) {
    const int t = threadIdx.x % 4, key_in_tile = threadIdx.x / 4;
    const std::uint32_t key = first + key_in_tile;
    KeyAddress address;
    if (key < end_) address = cta_.task.keys.locate(entry_, key);
    look_up(first + MqaTile::kKeys);
    const bool valid = address.values != nullptr;
    copy_row<kHeadDim, MqaTile::kThreads>(&shared_.raw[i % 2][0][threadIdx.x], address.values, t,
                                          valid, cta_.task.key_alignment);
    if (t == 0) {
      copy_float(&shared_.scale[i % 4][key_in_tile], address.scale, valid, cta_.task.key_alignment);
      if constexpr (Keys::kMayMiss) shared_.mapped[i % 4][key_in_tile] = valid;
    }
    ptx::cp_async_commit();
  }

  // Of unit u of this thread's key of tile i.
  __device__ __forceinline__ void make_fragments(unsigned i, int u) {
    const int key = threadIdx.x / 4;
    std::uint32_t f[Products::kUnitSteps][2];
    Products::fragments(shared_.raw[i % 2][u][threadIdx.x], f);
#pragma unroll
    for (int c = 0; c < kUnitChunks; ++c) {
      constexpr int kSecond = kSteps > 1 ? 1 : 0;  // D = 32 in e4m3 has one step
      shared_.fragments[i % 2][key][place(key, u * kUnitChunks + c)] = {
          f[2 * c][0], f[2 * c][1], f[2 * c + kSecond][0], f[2 * c + kSecond][1]};
    }
  }

  // Where a row of keys has chunk c of this lane: eight lanes, of an even key and the next one,
  // meet all banks once.
  __device__ __forceinline__ int place(int key, int c) const {
    const int chunk = c * 4 + cta_.lane % 4;
    return kLaneChunks > 1 ? chunk ^ ((key & 1) * 4) : chunk;
  }

  // A block of tile i, and this thread's part of tile i + 1.
  __device__ __forceinline__ void score_block(std::uint32_t first_of_tile, unsigned i, int block) {
    const auto make_next = [&] {
      if (Unit::kUnits == MqaTile::kBlocks || block == 0) make_fragments(i + 1, block);
    };
    const int first_key = block * MqaTile::kBlockKeys;
    const std::uint32_t first = first_of_tile + first_key;
    const KeyWindow seen = scores_.warp_window();
    if (first >= seen.end || first + MqaTile::kBlockKeys <= seen.begin) {
      make_next();
      return;
    }
    scores_.score(
        first,
        [&](int n, typename Scores::Fragments& b) {
          const int key = first_key + n * 8 + cta_.lane / 4;
#pragma unroll
          for (int c = 0; c < kLaneChunks; ++c) {
            const uint4 chunk = shared_.fragments[i % 2][key][place(cta_.lane / 4, c)];
            b[2 * c][0] = chunk.x, b[2 * c][1] = chunk.y;
            if constexpr (kSteps > 1) b[2 * c + 1][0] = chunk.z, b[2 * c + 1][1] = chunk.w;
          }
        },
        [&](int key) { return info(i, first_key + key); }, make_next,
        Emit{*this, first_of_tile, i});
  }

  __device__ __forceinline__ KeyInfo info(unsigned i, int key_in_tile) const {
    return {shared_.scale[i % 4][key_in_tile],
            !Keys::kMayMiss || shared_.mapped[i % 4][key_in_tile]};
  }

  // The first warp of a query adds the sums of the second. Its next ones go elsewhere.
  __device__ __forceinline__ void add_partial_sums(std::uint32_t first, unsigned i) {
    if (cta_.warp % 2 != 0) return;
#pragma unroll
    for (int key = cta_.lane; key < MqaTile::kKeys; key += 32) {
      const float sum =
          shared_.partial[i % 2][cta_.warp][key] + shared_.partial[i % 2][cta_.warp + 1][key];
      scores_.write(first + key, sum, info(i, key));
    }
  }

  const MqaCta<Keys>& cta_;
  SharedStorage& shared_;
  Scores scores_;
  std::uint32_t end_ = 0;  // of the keys that the CTA reads
  std::int32_t entry_ = -1;
};

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
__global__ void __launch_bounds__(MqaTile::kThreads, 1)
    portable_mqa_logits_kernel(const __grid_constant__ MqaTask<Keys> task) {
  using Logits = MqaLogits<ProductsOf, kHeadDim, kHeads, Keys>;
  extern __shared__ __align__(16) unsigned char shared[];
  const MqaCta<Keys> cta(task);
  Logits(cta, *reinterpret_cast<typename Logits::SharedStorage*>(shared)).run();
}

}  // namespace dsa::cuda
