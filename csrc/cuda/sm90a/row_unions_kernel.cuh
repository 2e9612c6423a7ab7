// SPDX-License-Identifier: Apache-2.0
// Unions of the rows that neighbouring query tokens have selected.
//
// A CTA has a group of kQueries tokens. It puts the first one's rows into a hash table, looks those
// of the next one up in it, adds what is new, and so on. A group has a union if at least half of
// each token's rows are also of those before it. First come the rows that all tokens have, then
// the others, both in an order that does not depend on who came first.
//
// A row that a token has twice counts twice. New ones are added twice; a group where a later token
// has one of them too has no union. Nor has one where a token has one of the others twice: it
// leaves fewer marks than it has rows.
//
// Shared     48 or 64 KiB: the table, in buckets, and who of the tokens after the first has what.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_keys.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/sm90a/row_unions.cuh"

namespace dsa::cuda::sm90a {

template <int kQueries_>
struct RowUnionsConfig {
  static constexpr int kQueries = kQueries_;
  static constexpr int kThreads = 512;
  static constexpr int kCtasPerSm = kQueries == 2 ? 4 : 3;
  static constexpr int kRows = 2048;  // of a token, at most
  static constexpr int kRowsOfThread = kRows / kThreads;
  static constexpr int kBucketBits = 11;
  static constexpr int kBuckets = 1 << kBucketBits;
  static constexpr int kOfBucket = 4;
  // Where more come to a bucket there is no union: of one row, mostly.
  static constexpr int kMostArrivals = 32;
  // The first token's rows, and half as many of each of the others but the last.
  static_assert(kRows * kQueries / 2 < kBuckets * kOfBucket);
  static_assert(RowUnions::kSlotBits + kQueries <= 32);

  // Rows of a union, at most.
  static constexpr std::int64_t capacity(std::int64_t rows) {
    return rows + (kQueries - 1) * (rows / 2);
  }

  struct SharedStorage {
    alignas(16) std::uint32_t slots[kBuckets][kOfBucket];  // a row's and 1; 0: nothing
    std::uint32_t counts[kBuckets];                        // more: others are in the next buckets
    // Whether a token after the first has a row that was there before it.
    alignas(16) std::uint8_t marks[kQueries - 1][kBuckets * kOfBucket];
    // Of a token's rows those that were not there before it, less the others: of its first rows,
    // and of the others. Of the first token 0.
    std::int32_t fresh[kQueries][2];
    std::int32_t unmarked;
    std::int32_t is_crowded;
    std::uint32_t of_warp[kThreads / 32];  // RowUnionBuilder::kOther
  };
};

template <typename Config>
class RowUnionBuilder {
 public:
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kNone = -1;

  __device__ RowUnionBuilder(SharedStorage& shared, const AttentionArgs& args, std::int64_t first)
      : shared_(shared), args_(args), first_(first) {}

  // By all threads: how many rows the group's union has, or kNone.
  __device__ int build(const RowUnions& unions, int group) {
    return find() ? store(unions.rows + std::int64_t{group} * unions.capacity) : kNone;
  }

 private:
  static constexpr std::uint32_t kNowhere = ~0u;
  // How many rows all tokens have, and kOther times the others.
  static constexpr std::uint32_t kOther = 1u << 16;
  static constexpr int kNever = 2 * Config::kRows;  // so many new rows are too many
  static constexpr int kLast = Config::kQueries - 1;

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  __device__ bool find() {
#pragma unroll
    for (int query = 0; query < Config::kQueries; ++query) fetch(query);
    clear();
    __syncthreads();
#pragma unroll
    for (int query = 0; query < Config::kQueries; ++query) {
      if (query > 0) {
        // Its first rows tell of most tokens that have nothing in common.
        auto& fresh = shared_.fresh[query];
        if (sum(fresh[0], look_up<0, 1>(query)) > Config::kThreads / 2) return false;
        if (sum(fresh[1], look_up<1, Config::kRowsOfThread>(query)) + fresh[0] > 0) return false;
      }
      if (query < kLast) {
        add(query);
        __syncthreads();
        if (shared_.is_crowded != 0) return false;
      }
    }
    return true;
  }

  __device__ void clear() {
    constexpr int kChunks = offsetof(SharedStorage, fresh) / sizeof(uint4);
    for (int i = thread(); i < kChunks; i += Config::kThreads) {
      reinterpret_cast<uint4*>(&shared_)[i] = uint4{};
    }
    if (thread() < 2 * Config::kQueries) shared_.fresh[thread() / 2][thread() % 2] = 0;
    if (thread() == 0) shared_.unmarked = 0, shared_.is_crowded = 0;
  }

  __device__ void fetch(int query) {
    const SlotList& list = args_.lists[0];
    const auto num_slots = static_cast<std::uint32_t>(list.rows.num_slots);
    const std::int64_t token = first_ + query;
    const std::int32_t* slots = list.slots + token * list.stride_b;
    const int count = list_size(list, token, 0);
#pragma unroll
    for (int i = 0; i < Config::kRowsOfThread; ++i) {
      const int key = i * Config::kThreads + thread();
      const std::uint32_t slot = key < count ? static_cast<std::uint32_t>(slots[key]) : kNowhere;
      rows_[query][i] = slot < num_slots ? slot : kNowhere;  // as below 0
    }
  }

  // Of all threads.
  __device__ static int sum(std::int32_t& shared, int own) {
    const auto of_warp = static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(own)));
    if (thread() % 32 == 0) atomicAdd(&shared, of_warp);
    __syncthreads();
    return shared;
  }

  __device__ static std::uint32_t first_bucket(std::uint32_t slot) {
    return slot * 0x9E3779B1u >> (32 - Config::kBucketBits);
  }
  __device__ static std::uint32_t next_bucket(std::uint32_t bucket) {
    return (bucket + 1) % Config::kBuckets;
  }

  // Rows of a token that are there are marked, and done with. Returns how many are not, less those.
  template <int kBegin, int kEnd>
  __device__ int look_up(int query) {
    int fresh = 0;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      std::uint32_t& row = rows_[query][i];
      if (row == kNowhere) continue;
      const int entries = mark(row, &shared_.marks[query - 1][0]);
      fresh += entries == 0 ? 1 : entries == 1 ? -1 : kNever;
      if (entries > 0) row = kNowhere;
    }
    return fresh;
  }
  // All entries of a slot; how many there are.
  __device__ int mark(std::uint32_t slot, std::uint8_t* marks) const {
    int entries = 0;
    for (std::uint32_t bucket = first_bucket(slot);; bucket = next_bucket(bucket)) {
      const uint4 there = *reinterpret_cast<const uint4*>(shared_.slots[bucket]);
      const auto compare = [&](std::uint32_t other, std::uint32_t place) {
        if (other != slot + 1) return;
        marks[bucket * Config::kOfBucket + place] = 1;
        ++entries;
      };
      compare(there.x, 0);
      compare(there.y, 1);
      compare(there.z, 2);
      compare(there.w, 3);
      if (there.w == 0) return entries;
    }
  }

  // What is left of a token's rows; instead of their slots their entries.
  __device__ void add(int query) {
#pragma unroll
    for (std::uint32_t& row : rows_[query]) {
      if (row == kNowhere) continue;
      std::uint32_t bucket = first_bucket(row), place;
      while ((place = atomicAdd(&shared_.counts[bucket], 1u)) >= Config::kOfBucket) {
        if (place >= Config::kMostArrivals) {
          shared_.is_crowded = 1;
          return;
        }
        bucket = next_bucket(bucket);
      }
      shared_.slots[bucket][place] = row + 1;
      row = bucket * Config::kOfBucket + place;
    }
  }

  // As RowUnions has it, what has come by this token.
  __device__ std::uint32_t row_of(std::uint32_t row, int query) const {
    std::uint32_t queries = 1u << query;
    if (query == kLast) return queries << RowUnions::kSlotBits | row;
    const std::uint32_t slot = (&shared_.slots[0][0])[row] - 1;
#pragma unroll
    for (int later = query + 1; later < Config::kQueries; ++later) {
      const bool is_marked = (&shared_.marks[later - 1][0])[row] != 0;
      queries |= is_marked ? 1u << later : 0;
    }
    return queries << RowUnions::kSlotBits | slot;
  }

  __device__ int store(std::uint32_t* rows) {
    constexpr std::uint32_t kAll = (1u << Config::kQueries) - 1;
    const auto is_of_all = [](std::uint32_t row) { return row >> RowUnions::kSlotBits == kAll; };
    std::uint32_t own = 0;
    int unmarked = 0;  // new rows of tokens after the first, less marks
#pragma unroll
    for (int query = 0; query < Config::kQueries; ++query) {
#pragma unroll
      for (std::uint32_t& row : rows_[query]) {
        row = row == kNowhere ? 0 : row_of(row, query);
        if (row == 0) continue;
        own += query == 0 && is_of_all(row) ? 1 : kOther;
        unmarked += (query > 0 ? 2 : 1) - __popc(row >> RowUnions::kSlotBits);
      }
    }
    const int warp = thread() / 32, lane = thread() % 32;
    std::uint32_t before = own;  // and own
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const std::uint32_t lower = __shfl_up_sync(~0u, before, lanes);
      if (lane >= lanes) before += lower;
    }
    if (lane == 31) shared_.of_warp[warp] = before;
    int expected = 0;
    for (const auto& fresh : shared_.fresh) expected += fresh[0] + fresh[1];
    if (sum(shared_.unmarked, unmarked) != expected) return kNone;
    before -= own;
    std::uint32_t all = 0;
    for (int i = 0; i < Config::kThreads / 32; ++i) {
      if (i < warp) before += shared_.of_warp[i];
      all += shared_.of_warp[i];
    }
    std::uint32_t of_all = before % kOther, others = all % kOther + before / kOther;
#pragma unroll
    for (int query = 0; query < Config::kQueries; ++query) {
#pragma unroll
      for (const std::uint32_t row : rows_[query]) {
        if (row == 0) continue;
        if (query == 0 && is_of_all(row)) {
          rows[of_all++] = row;
        } else {
          rows[others++] = row;
        }
      }
    }
    return static_cast<int>(all % kOther + all / kOther);
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const std::int64_t first_;
  // Slots; of what is in the table its entry; at last as RowUnions has them. kNowhere, 0: done
  // with.
  std::uint32_t rows_[Config::kQueries][Config::kRowsOfThread];
};

// tokens: of the launch.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    sm90a_row_unions_kernel(const __grid_constant__ AttentionArgs args,
                            const __grid_constant__ RowUnions unions, int tokens) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int group = static_cast<int>(blockIdx.x), first = group * Config::kQueries;
  RowUnionBuilder<Config> builder(shared, args, args.first_row + first);
  const int size =
      first + Config::kQueries <= tokens ? builder.build(unions, group) : builder.kNone;
  if (threadIdx.x != 0) return;
  if (size != builder.kNone) {
    unions.sizes[group] = size;
    unions.groups[atomicAdd(&unions.counts[0], 1u)] = static_cast<unsigned>(group);
  } else {
    unions.add_tokens(first, min(Config::kQueries, tokens - first));
  }
}

}  // namespace dsa::cuda::sm90a
