// SPDX-License-Identifier: Apache-2.0
// indexer_k_quant_and_cache and gather_indexer_k_cache.
//
// Write: a token's key is one group of up to 128 values, in the registers of a team of 8 lanes, 16
// values each. One token a team, and so few registers that 2048 threads an SM keep loads in flight:
// more tokens a team were slower. No shared memory, no barriers.
//
// Gather: a cta takes kGatherRows rows. Their places are found once for the cta (shared memory:
// the places and a request a row; the barriers are find_places'); a thread each then moves the
// scales, and teams of 8 lanes the codes, 16 bytes a lane and all rows of a team in flight
// together.
#pragma once

#include <cstdint>

#include "cuda/common/quantise.cuh"
#include "cuda/common/ragged_rows.cuh"
#include "cuda/common/slot_mapping.cuh"
#include "cuda/common/vector.cuh"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

inline constexpr int kIndexerThreads = 256;
inline constexpr int kIndexerTeam = 8;
inline constexpr int kIndexerTeams = kIndexerThreads / kIndexerTeam;
inline constexpr int kMaxWrittenHeadDim = kIndexerTeam * kLaneValues;  // one scale a token
inline constexpr int kWriteThreads = 128;
inline constexpr int kWriteTokens = kWriteThreads / kIndexerTeam;
// All threads of an SM, which leaves them 32 registers each; values of 4 bytes need 40.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || \
                               __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
inline constexpr int kSmThreads = 1536;
#else
inline constexpr int kSmThreads = 2048;
#endif
template <typename T>
inline constexpr int kWriteCtas = (sizeof(T) == 2 ? kSmThreads : 1536) / kWriteThreads;
inline constexpr int kRowsPerTeam = 4;
inline constexpr int kGatherRows = kIndexerTeams * kRowsPerTeam;

// Where the codes and the scale of a token of a page stand.
struct IndexerPages {
  std::uint8_t* data;
  std::int64_t page_stride;
  IndexerLayout layout;

  explicit IndexerPages(const TensorView& kv_cache)
      : data(kv_cache.ptr<std::uint8_t>()),
        page_stride(kv_cache.stride(0)),
        layout{kv_cache.size(3) - IndexerLayout::kScaleBytes, kv_cache.size(1)} {}

  __device__ std::uint8_t* values(const CachePlace& place) const {
    return data + place.page * page_stride + layout.values(place.token);
  }
  __device__ std::uint8_t* scale(const CachePlace& place) const {
    return data + place.page * page_stride + layout.scale(place.token);
  }
};

struct IndexerWrite {
  TensorView k;  // [T, D]
  IndexerPages pages;
  FastDivisor page_size;
  std::int64_t num_slots;
  TensorView slot_mapping;  // [T]
  bool ue8m0;
};

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kWriteThreads, kWriteCtas<T>)
    portable_indexer_cache_write_kernel(IndexerWrite write) {
  const int lane = static_cast<int>(threadIdx.x) % kIndexerTeam;
  const int begin = lane * kLaneValues;
  const std::int64_t token =
      std::int64_t{blockIdx.x} * kWriteTokens + static_cast<int>(threadIdx.x) / kIndexerTeam;
  const std::int64_t valid = write.pages.layout.head_dim - begin;
  // Teams past the last token go on with nothing, since the warp's shuffles need all lanes.
  const bool any = token < write.k.size(0);
  const Pack<T, kLaneValues> values = load<kWhole, T, kLaneValues>(
      write.k.ptr<const T>() + (any ? token : 0) * write.k.stride(0) + begin, any ? valid : 0);
  // After the key, so that this does not wait for it.
  const std::int64_t slot =
      any ? read_slot(write.slot_mapping, token, write.num_slots) : kInvalidSlot;
  float scale = group_scale_of_team<kIndexerTeam>(values);
  if (write.ue8m0) scale = ue8m0_decode(ue8m0_encode(scale));
  const Pack<std::uint8_t, kLaneValues> codes = quantise(values, scale);
  if (slot < 0) return;
  const std::int64_t page = write.page_size.quotient(slot);
  const CachePlace place{page, slot - page * write.page_size.divisor()};
  store<kWhole>(write.pages.values(place) + begin, codes, valid);
  if (lane == 0) store_unaligned(write.pages.scale(place), scale);
}

struct IndexerGather {
  IndexerPages pages;
  RaggedRows rows;
  TensorView k;        // [num_tokens, D]
  TensorView k_scale;  // [num_tokens]
};

template <bool kWhole>
__global__ void __launch_bounds__(kIndexerThreads, 5)
    portable_indexer_cache_gather_kernel(IndexerGather gather) {
  __shared__ CachePlace places[kGatherRows];
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kGatherRows;
  const std::int64_t num_rows = gather.k.size(0) - first_row;  // from here to the end
  find_places<kGatherRows, kIndexerThreads>(gather.rows, first_row, places);

  const int thread = static_cast<int>(threadIdx.x);
  const bool moves_scale = thread < kGatherRows && thread < num_rows;
  float scale = 0.0f;  // stored at the end: nothing waits for it
  if (moves_scale && places[thread].page >= 0) {
    scale = load_unaligned(gather.pages.scale(places[thread]));
  }

  const int team = thread / kIndexerTeam;
  for (std::int64_t begin = thread % kIndexerTeam * kVectorBytes; begin < gather.k.size(1);
       begin += kIndexerTeam * kVectorBytes) {
    const std::int64_t valid = gather.k.size(1) - begin;
    Pack<std::uint8_t, kVectorBytes> codes[kRowsPerTeam];
#pragma unroll
    for (int i = 0; i < kRowsPerTeam; ++i) {
      const CachePlace place = places[team + i * kIndexerTeams];
      const bool mapped = place.page >= 0;
      const std::uint8_t* values = mapped ? gather.pages.values(place) : gather.pages.data;
      codes[i] = load<kWhole, std::uint8_t, kVectorBytes>(values + begin, mapped ? valid : 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsPerTeam; ++i) {
      const int row = team + i * kIndexerTeams;
      std::uint8_t* key = gather.k.ptr<std::uint8_t>() + (first_row + row) * gather.k.stride(0);
      store<kWhole>(key + begin, codes[i], row < num_rows ? valid : 0);
    }
  }
  if (moves_scale) {
    gather.k_scale.ptr<float>()[(first_row + thread) * gather.k_scale.stride(0)] = scale;
  }
}

}  // namespace dsa::cuda
