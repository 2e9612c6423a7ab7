// SPDX-License-Identifier: Apache-2.0
// The producers of 16-bit attention of few heads: four warps copy rows of latents, 16 bytes a lane,
// or have the copy engine load whole blocks of a page.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/named_barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/latent_few_config.h"
#include "cuda/sm90a/latent_fwd_row_copy.cuh"
#include "cuda/sm90a/latent_fwd_task.cuh"

namespace dsa::cuda::sm90a {

// A dense cache whose pages are whole blocks, which the copy engine loads.
struct LatentFewPages {
  CUtensorMap map;
  bool are_blocks;  // else there is no map
};

// Of a worker's queries and blocks, which take turns in one place of shared memory.
template <typename Config, int kWorker>
class LatentFewProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ LatentFewProducer(SharedStorage& shared, const AttentionArgs& args,
                               const LatentFewPages& pages, int thread)
      : shared_(shared), args_(args), pages_(pages), warp_(thread / 32), lane_(thread % 32) {}

  // All of this worker's work, of which the first task is there. The next one is found out before
  // the rows of one are copied.
  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::template Turns<kWorker> turns(grid);
    if (turns.has(0)) fetched_ = fetch(task(0), 0);
    for (unsigned n = 0; turns.has(n); ++n) {
      load_q(n);
      if (turns.has(n + 1)) prepare(grid, turns.work(n + 1), n + 1);
      run(n, turns.has(n + 1));
    }
  }

 private:
  __device__ LatentFwdTask& task(unsigned n) const { return shared_.tasks[kWorker][n % 2]; }

  // The rows of the n-th piece of work.
  __device__ void run(unsigned n, bool has_next) {
    if (task(n).blocks == 0 && has_next) fetched_ = fetch(task(n + 1), 0);
    for (int block = 0; block < task(n).blocks; ++block) {
      const std::int32_t slot = fetched_;
      if (block + 1 < task(n).blocks) {
        fetched_ = fetch(task(n), block + 1);
      } else if (has_next) {
        fetched_ = fetch(task(n + 1), 0);
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
  static_assert(Config::kTokens == LatentRowCopy::kTileRows);
  static_assert(Config::kProducerThreads == LatentRowCopy::kThreads);

  // By all threads. The task before the last one has been done by all of them.
  __device__ void prepare(const LatentFwdGrid& grid, const LatentFwdWork& work, unsigned n) const {
    ptx::named_sync<LatentFewBarrier::kProducer + kWorker, Config::kProducerThreads>();
    if (warp_ == 0 && lane_ == 0) find_latent_task<Config>(args_, grid, work, task(n));
    __syncwarp();
    ptx::named_sync<LatentFewBarrier::kProducer + kWorker, Config::kProducerThreads>();
  }

  // q, as rows are copied, and what the mathematics has to know of their work.
  __device__ void load_q(unsigned n) const {
    const AttentionPlace& at = task(n).place;
    const auto* q = reinterpret_cast<const std::uint8_t*>(
        args_.q + at.b * args_.q_stride_b + at.j * args_.q_stride_j +
        (at.first_head + row()) * args_.q_stride_h);
    const std::uint8_t* own = row() < at.heads ? q : nullptr;
    ptx::mbarrier_wait(shared_.empty_q[kWorker], n % 2 ^ 1);
    const LatentRowCopy rows(own, warp_, lane_);
#pragma unroll
    for (int dims = 0; dims < Config::kDimBlocks; ++dims) {
      rows.copy<Config::kHeads>(shared_.q[kWorker][dims], dims);
    }
    ptx::mbarrier_arrive_after_cp_async(shared_.full_q[kWorker]);
    if (warp_ == 0 && lane_ == 0) {
      shared_.places[kWorker][n % 2] = at;
      shared_.blocks[kWorker] = task(n).blocks;
      ptx::mbarrier_arrive(shared_.full_q[kWorker]);
    }
    __syncwarp();
  }

  __device__ int row() const { return LatentRowCopy::own_row(warp_, lane_); }
  __device__ int key(const LatentFwdTask& task, int block) const {
    return (task.first_block + block) * Config::kTokens + row();
  }
  __device__ std::int32_t fetch(const LatentFwdTask& task, int block) const {
    return task.keys.fetch(args_, key(task, block));
  }

  // Whether a block is all of tokens of one page, which is there.
  __device__ bool is_whole(const LatentFwdTask& task, int block, std::int32_t page) const {
    return pages_.are_blocks &&
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
      const int part = Config::part_at(i);
      ptx::Mbarrier& full = shared_.full[kWorker][part];
      constexpr int kShare = 32;
      ptx::mbarrier_wait(shared_.empty[kWorker][part], phase_ ^ 1);
      if (part == 0) {
        shared_.lacks[kWorker].by_warp[warp_] = false;
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
        ptx::tma_load(shared_.kv[kWorker][dims], pages_.map, full, dims * 128, token, page);
      }
    }
  }

  // By all lanes, row by row.
  __device__ void copy(const LatentFwdTask& task, int block, std::int32_t slot) const {
    const std::uint8_t* own = task.keys.row(args_, key(task, block), slot).values;
    const LatentRowCopy rows(own, warp_, lane_);
    const bool is_valid = own != nullptr;
#pragma unroll
    for (int i = 0; i < Config::kParts; ++i) {
      const int part = Config::part_at(i);
      ptx::Mbarrier& full = shared_.full[kWorker][part];
      ptx::mbarrier_wait(shared_.empty[kWorker][part], phase_ ^ 1);
#pragma unroll
      for (int k = 0; k < Config::dim_blocks(part); ++k) {
        const int dims = Config::first_dim_block(part) + k;
        rows.copy(shared_.kv[kWorker][dims], dims);
      }
      ptx::mbarrier_arrive_after_cp_async(full);
      if (part == 0) {
        shared_.valid[kWorker][row()] = is_valid ? 1 : 0;
        const bool lacks = __any_sync(~0u, !is_valid);
        if (lane_ == 0) shared_.lacks[kWorker].by_warp[warp_] = lacks;
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(full);
      }
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const LatentFewPages& pages_;
  const int warp_, lane_;
  std::uint32_t phase_ = 0;
  std::int32_t fetched_;  // for the next block
};

}  // namespace dsa::cuda::sm90a
