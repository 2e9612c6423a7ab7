// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's producers: four warps copy rows of latents, 16 bytes a lane, or
// have the copy engine load whole blocks of a page.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"

namespace dsa::cuda::sm90a {

// A dense cache whose pages are whole blocks, which the copy engine loads.
struct LatentFwdPages {
  CUtensorMap map;
  bool are_blocks;  // else there is no map
};

template <typename Config>
__device__ void find_latent_task(const AttentionArgs& args, const LatentFwdWork& work,
                                 LatentFwdTask& task) {
  task.place = AttentionPlace(args, Config::kHeads, work.tile, work.split);
  task.keys.init(args, task.place.b, task.place.j);
  const TileShare share(args, task.keys.size(), Config::kTokens, work.split);
  task.first_block = share.first;
  task.blocks = share.count;
}

// Of the blocks that take turns in one place of shared memory: all of a work's with few heads, else
// every other one. One of a work's producers also loads q. A warp copies 16 rows, each of which a
// lane has looked up: a lane 16 of each 128 bytes of four of them.
template <typename Config, int kPlace>
class LatentFwdProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ LatentFwdProducer(SharedStorage& shared, const AttentionArgs& args,
                               const LatentFwdPages& pages, int thread)
      : shared_(shared), args_(args), pages_(pages), warp_(thread / 32), lane_(thread % 32) {}

  // All of this worker's work, of which the first task is there. The next one is found out before
  // the rows of one are copied.
  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::template Turns<kPlace> turns(grid);
    if (turns.has(0)) fetched_ = fetch(task(0), kFirst);
    for (unsigned n = 0; turns.has(n); ++n) {
      if (Config::kFew || kPlace == 1) load_q(n);
      if (turns.has(n + 1)) prepare(turns.work(n + 1), n + 1);
      run(n, turns.has(n + 1));
    }
  }

 private:
  __device__ LatentFwdTask& task(unsigned n) const { return shared_.tasks[kPlace][n % 2]; }

  static constexpr int kWorker = Config::worker_of(kPlace);
  // A work's blocks here. With two producers the last may have no tokens.
  static constexpr int kFirst = Config::kFew ? 0 : kPlace, kStep = Config::kFew ? 1 : 2;
  __device__ static bool is_of(const LatentFwdTask& task, int block) {
    return block < task.blocks + kFirst;
  }

  // The rows of the n-th piece of work.
  __device__ void run(unsigned n, bool has_next) {
    if (task(n).blocks == 0 && has_next) fetched_ = fetch(task(n + 1), kFirst);
    for (int block = kFirst; is_of(task(n), block); block += kStep) {
      const std::int32_t slot = fetched_;
      if (is_of(task(n), block + kStep)) {
        fetched_ = fetch(task(n), block + kStep);
      } else if (has_next) {
        fetched_ = fetch(task(n + 1), kFirst);
      }
      if (is_whole(task(n), block, slot)) {
        if (ptx::elect_one()) load(task(n), block, slot);
        __syncwarp();
      } else {
        copy(task(n), block, slot);
      }
      phase_ ^= 1;
    }
  }

  static constexpr int kWarps = Config::kProducerThreads / 32;
  static constexpr int kRows = 4;  // of a lane, from one to the next 16
  static constexpr int kRowsApart = 16;
  static_assert(kWarps * kRows == kRowsApart && kRows * kRowsApart == Config::kTokens);

  // By all threads. The task before the last one has been done by all of them.
  __device__ void prepare(const LatentFwdWork& work, unsigned n) const {
    ptx::named_sync<LatentFwdBarrier::kProducer + kPlace, Config::kProducerThreads>();
    if (warp_ == 0 && lane_ == 0) find_latent_task<Config>(args_, work, task(n));
    __syncwarp();
    ptx::named_sync<LatentFwdBarrier::kProducer + kPlace, Config::kProducerThreads>();
  }

  // q, as rows are copied, and what the mathematics has to know of their work.
  __device__ void load_q(unsigned n) const {
    const AttentionPlace& at = task(n).place;
    const auto* q = reinterpret_cast<const std::uint8_t*>(
        args_.q + at.b * args_.q_stride_b + at.j * args_.q_stride_j +
        (at.first_head + row()) * args_.q_stride_h);
    const std::uint8_t* own = row() < at.heads ? q : nullptr;
    ptx::mbarrier_wait(shared_.empty_q[kWorker], n % 2 ^ 1);
    const Rows rows(own, lane_);
#pragma unroll
    for (int dims = 0; dims < Config::kDimBlocks; ++dims) {
      rows.template copy<Config::kHeads>(to(shared_.q[kWorker][dims]), dims, first_row());
    }
    ptx::mbarrier_arrive_after_cp_async(shared_.full_q[kWorker]);
    if (warp_ == 0 && lane_ == 0) {
      shared_.places[kWorker][n % 2] = at;
      shared_.blocks[kWorker] = (task(n).blocks + kStep - 1) / kStep;
      ptx::mbarrier_arrive(shared_.full_q[kWorker]);
    }
    __syncwarp();
  }

  // The row of a block that this lane looks up; two lanes have the same.
  __device__ int row() const {
    return kRows * warp_ + lane_ % kRows + lane_ / kRows % kRows * kRowsApart;
  }
  __device__ int key(const LatentFwdTask& task, int block) const {
    return (task.first_block + block) * Config::kTokens + row();
  }
  __device__ std::int32_t fetch(const LatentFwdTask& task, int block) const {
    return task.keys.fetch(args_, key(task, block));
  }

  // Where in 64 dims of a block, [tokens, 128 bytes] swizzled, this lane's first row has its chunk.
  __device__ std::uint32_t to(const std::uint8_t* dims) const {
    return ptx::shared_address(dims) + first_row() * 128 + (lane_ % 8 ^ first_row() % 8) * 16;
  }
  __device__ int first_row() const { return kRows * warp_ + lane_ / 8; }

  // The rows that a lane copies chunks of.
  class Rows {
   public:
    // own: what this lane has looked up; nullptr: zeros.
    __device__ Rows(const std::uint8_t* own, int lane) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const std::uint64_t row =
            __shfl_sync(~0u, reinterpret_cast<std::uint64_t>(own), lane / 8 + i * kRows);
        is_there_[i] = row != 0;
        from_[i] = reinterpret_cast<const std::uint8_t*>(row) + lane % 8 * 16;
      }
    }
    // Those of the first kEnd.
    template <int kEnd = Config::kTokens>
    __device__ void copy(std::uint32_t to, int dims, int first_row = 0) const {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (kEnd < (i + 1) * kRowsApart && first_row + i * kRowsApart >= kEnd) continue;
        ptx::cp_async_or_zeros<16>(to + i * kRowsApart * 128, from_[i] + dims * 128, is_there_[i]);
      }
    }

   private:
    const std::uint8_t* from_[kRows];
    bool is_there_[kRows];
  };

  // Whether a block is all of tokens of one page, which is there.
  __device__ bool is_whole(const LatentFwdTask& task, int block, std::int32_t page) const {
    return pages_.are_blocks && block < task.blocks &&
           (task.first_block + block + 1) * Config::kTokens <= task.keys.size() && page >= 0 &&
           page < args_.lists[0].rows.num_pages;
  }

  // By a lane of each warp, which arrives for the warp as copies would, so that nobody is more than
  // a phase behind; the copy engine loads the warp's parts.
  __device__ void load(const LatentFwdTask& task, int block, std::int32_t page) const {
    const auto& page_size = args_.lists[0].rows.page_size;
    const int first = (task.first_block + block) * Config::kTokens;
    const int token = first - static_cast<int>(page_size.quotient(first) * page_size.divisor());
#pragma unroll
    for (int i = 0; i < Config::kParts; ++i) {
      const int part = Config::part_at(kPlace, i);
      ptx::Mbarrier& full = shared_.full[kPlace][part];
      constexpr int kShare = 32;
      ptx::mbarrier_wait(shared_.empty[kPlace][part], phase_ ^ 1);
      if (part == 0) {
        shared_.lacks[kPlace].by_warp[warp_] = false;
        ptx::mbarrier_arrive(full);
      }
      if (i % kWarps != warp_) {
        ptx::mbarrier_arrive(full, kShare);
        continue;
      }
      ptx::mbarrier_arrive(full, kShare - 1);
      ptx::mbarrier_arrive_expect(full, Config::dim_blocks(part) * Config::kBlockBytes);
      for (int k = 0; k < Config::dim_blocks(part); ++k) {
        const int dims = Config::first_dim_block(part) + k;
        ptx::tma_load(shared_.kv[kPlace][dims], pages_.map, full, dims * 128, token, page);
      }
    }
  }

  // By all lanes, row by row.
  __device__ void copy(const LatentFwdTask& task, int block, std::int32_t slot) const {
    const std::uint8_t* own =
        block < task.blocks ? task.keys.row(args_, key(task, block), slot).values : nullptr;
    const Rows rows(own, lane_);
    const bool is_valid = own != nullptr;
#pragma unroll
    for (int i = 0; i < Config::kParts; ++i) {
      const int part = Config::part_at(kPlace, i);
      ptx::Mbarrier& full = shared_.full[kPlace][part];
      ptx::mbarrier_wait(shared_.empty[kPlace][part], phase_ ^ 1);
#pragma unroll
      for (int k = 0; k < Config::dim_blocks(part); ++k) {
        const int dims = Config::first_dim_block(part) + k;
        rows.copy(to(shared_.kv[kPlace][dims]), dims);
      }
      ptx::mbarrier_arrive_after_cp_async(full);
      if (part == 0) {
        shared_.valid[kPlace][row()] = is_valid ? 1 : 0;
        const bool lacks = __any_sync(~0u, !is_valid);
        if (lane_ == 0) shared_.lacks[kPlace].by_warp[warp_] = lacks;
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(full);
      }
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const LatentFwdPages& pages_;
  const int warp_, lane_;
  std::uint32_t phase_ = 0;
  std::int32_t fetched_;  // for the next block
};

}  // namespace dsa::cuda::sm90a
