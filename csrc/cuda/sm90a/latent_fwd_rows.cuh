// SPDX-License-Identifier: Apache-2.0
// The producer of rows: four warps find what there is to do, and copy queries and tokens.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_row_copy.cuh"

namespace dsa::cuda::sm90a {

template <typename Config>
class LatentFwdRows {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ LatentFwdRows(SharedStorage& shared, const AttentionArgs& args, int thread)
      : shared_(shared), args_(args), warp_(thread / 32), lane_(thread % 32) {}

  // A work's next task is found, and its first slots are fetched, before its last block is copied.
  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::Turns turns(grid);
    if (turns.has(0)) prepare(grid, turns, 0);
    for (unsigned n = 0; turns.has(n); ++n) {
      load_q(n);
#pragma unroll 1
      for (int block = 0; block < task(n).blocks; ++block) {
        const std::uint8_t* own = task(n).keys.row(args_, key(task(n), block), fetched_).values;
        const unsigned queries = queries_of(own);
        if (block + 1 < task(n).blocks) {
          fetched_ = task(n).keys.fetch(args_, key(task(n), block + 1));
        } else if (turns.has(n + 1)) {
          prepare(grid, turns, n + 1);
        }
        load(own, queries);
      }
    }
  }

 private:
  static_assert(Config::kProducerThreads == LatentRowCopy::kThreads);
  static_assert(Config::kTokens == LatentRowCopy::kTileRows);
  static_assert(Config::kHeads == LatentRowCopy::kTileRows);

  using Task = typename Config::Task;
  __device__ Task& task(unsigned n) const { return shared_.tasks[n % 2]; }

  // By all threads: the n-th task and its first slots. A split without keys has a block without
  // tokens.
  __device__ void prepare(const LatentFwdGrid& grid, const typename Config::Turns& turns,
                          unsigned n) {
    if (warp_ == 0 && lane_ == 0) {
      ptx::mbarrier_wait(shared_.empty_task[n % 2], n / 2 % 2 ^ 1);
      find_latent_task<Config>(args_, grid, turns.work(n), task(n));
      task(n).blocks = max(task(n).blocks, 1);
      ptx::mbarrier_arrive(shared_.full_task[n % 2]);
    }
    __syncwarp();
    ptx::named_sync<LatentFwdBarrier::kProducer, Config::kProducerThreads>();
    fetched_ = task(n).keys.fetch(args_, key(task(n), 0));
  }

  __device__ int row() const { return LatentRowCopy::own_row(warp_, lane_); }
  __device__ int key(const Task& task, int block) const {
    return (task.first_block + block) * Config::kTokens + row();
  }

  // Of this thread's copies, and of what its warp has stored.
  __device__ void arrive(ptx::Mbarrier& full) const {
    ptx::mbarrier_arrive_after_cp_async(full);
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(full);
  }

  // Into the next place, when it is free, from that many times 128 bytes on.
  __device__ void load_part(const LatentRowCopy& rows, int first) {
#pragma unroll
    for (int k = 0; k < Config::kPartBlocks; ++k) {
      rows.copy(shared_.kv[ring_.index][k], first + k);
    }
    arrive(shared_.full[ring_.index]);
    ring_.next();
  }
  __device__ void wait_for_place() const {
    ptx::mbarrier_wait(shared_.empty[ring_.index], ring_.phase ^ 1);
  }

  // q: what will be in registers comes as parts do.
  __device__ void load_q(unsigned n) {
    const AttentionPlace& at = task(n).place;
    const int query = row() / Config::kHeadsOfQuery, head = row() % Config::kHeadsOfQuery;
    const auto* q = reinterpret_cast<const std::uint8_t*>(
        args_.q + (at.b + query) * args_.q_stride_b + at.j * args_.q_stride_j +
        (at.first_head + head) * args_.q_stride_h);
    const LatentRowCopy rows(head < at.heads ? q : nullptr, warp_, lane_);
#pragma unroll
    for (int part = 0; part < Config::kHeldParts; ++part) {
      wait_for_place();
      load_part(rows, part * Config::kPartBlocks);
    }
    ptx::mbarrier_wait(shared_.empty_q, n % 2 ^ 1);
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(shared_.q) / Config::kBlockBytes); ++k) {
      rows.copy(shared_.q[k], Config::kHeldBlocks + k);
    }
    arrive(shared_.full_q);
  }

  // A bit for each query token that has the row which this lane has looked up.
  __device__ unsigned queries_of(const std::uint8_t* own) const {
    if constexpr (Config::kQueries > 1) return UnionSequence::queries(fetched_);
    return own != nullptr ? 1 : 0;
  }

  // A block. own: the row that this lane has looked up, or nullptr.
  __device__ void load(const std::uint8_t* own, unsigned queries) {
    const LatentRowCopy rows(own, warp_, lane_);
#pragma unroll
    for (int part = 0; part < Config::kParts; ++part) {
      if (Config::kRope > 0 && part == Config::kParts - 1) {  // its place is free before this one
        ptx::mbarrier_wait(shared_.empty_rope[rope_ring_.index], rope_ring_.phase ^ 1);
        rows.copy(shared_.rope[rope_ring_.index], Config::kDimBlocks);
        arrive(shared_.full_rope[rope_ring_.index]);
        rope_ring_.next();
      }
      wait_for_place();
      if (part == 0) {
#pragma unroll
        for (int query = 0; query < Config::kQueries; ++query) {
          const unsigned valid = __ballot_sync(~0u, queries >> query & 1);
          auto& of_warp = shared_.tokens_of[ring_.index].valid[query][warp_];
          if (lane_ == 0) of_warp = static_cast<std::uint16_t>(valid);
        }
      }
      load_part(rows, part * Config::kPartBlocks);
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const int warp_, lane_;
  LatentFwdRing<Config::kPlaces> ring_;
  LatentFwdRing<Config::kRopePlaces> rope_ring_;
  // For the next block.
  decltype(std::declval<Task>().keys.fetch(std::declval<AttentionArgs>(), 0)) fetched_;
};

}  // namespace dsa::cuda::sm90a
