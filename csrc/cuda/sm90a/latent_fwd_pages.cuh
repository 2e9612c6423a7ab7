// SPDX-License-Identifier: Apache-2.0
// The producer of pages: one thread finds what there is to do, and has the copy engine load queries
// and blocks of tokens.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"

namespace dsa::cuda::sm90a {

// Of queries and of pages; by rows there are none.
struct LatentFwdMaps {
  CUtensorMap q, pages;
};

template <typename Config>
class LatentFwdPages {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ LatentFwdPages(SharedStorage& shared, const AttentionArgs& args,
                            const LatentFwdMaps& maps)
      : shared_(shared), args_(args), maps_(maps) {}

  __device__ void run(const LatentFwdGrid& grid) {
    const typename Config::Turns turns(grid);
    for (unsigned n = 0; turns.has(n); ++n) {
      ptx::mbarrier_wait(shared_.empty_task[n % 2], n / 2 % 2 ^ 1);
      find_task(grid, turns.work(n), shared_.tasks[n % 2]);
      ptx::mbarrier_arrive(shared_.full_task[n % 2]);
      const LatentFwdTask& task = shared_.tasks[n % 2];
      load_q(task.place, n);
      std::int32_t page = fetch(task, 0);
#pragma unroll 1
      for (int block = 0; block < task.blocks; ++block) {
        const std::int32_t next = fetch(task, block + 1);
        load(task, block, page);
        page = next;
      }
    }
  }

 private:
  // A split without keys has a block without tokens.
  __device__ void find_task(const LatentFwdGrid& grid, const LatentFwdWork& work,
                            LatentFwdTask& task) const {
    find_latent_task<Config>(args_, grid, work, task);
    task.blocks = max(task.blocks, 1);
  }

  __device__ std::int32_t fetch(const LatentFwdTask& task, int block) const {
    return task.keys.fetch(args_, (task.first_block + block) * Config::kTokens);
  }

  // The barrier of the next place for a part, which is free.
  __device__ ptx::Mbarrier& next_place() const {
    ptx::mbarrier_wait(shared_.empty[ring_.index], ring_.phase ^ 1);
    return shared_.full[ring_.index];
  }

  // q: what will be in registers comes as parts do.
  __device__ void load_q(const AttentionPlace& at, unsigned n) {
    const auto load = [&](std::uint8_t* to, ptx::Mbarrier& full, int dims) {
      ptx::tma_load(to, maps_.q, full, dims * 128, at.first_head, static_cast<std::int32_t>(at.j),
                    static_cast<std::int32_t>(at.b));
    };
#pragma unroll 1
    for (int part = 0; part < Config::kHeldParts; ++part, ring_.next()) {
      ptx::Mbarrier& full = next_place();
      ptx::mbarrier_arrive_expect(full, Config::kPartBlocks * Config::kBlockBytes);
      for (int k = 0; k < Config::kPartBlocks; ++k) {
        load(shared_.kv[ring_.index][k], full, part * Config::kPartBlocks + k);
      }
    }
    ptx::mbarrier_wait(shared_.empty_q, n % 2 ^ 1);
    ptx::mbarrier_arrive_expect(shared_.full_q, sizeof(shared_.q));
#pragma unroll 1
    for (int k = 0; k < static_cast<int>(sizeof(shared_.q) / Config::kBlockBytes); ++k) {
      load(shared_.q[k], shared_.full_q, Config::kHeldBlocks + k);
    }
  }

  // A block, of whatever is in its page behind the last token; without a page nothing.
  __device__ void load(const LatentFwdTask& task, int block, std::int32_t page) {
    const bool is_there = page >= 0 && page < args_.lists[0].rows.num_pages;
    const auto& page_size = args_.lists[0].rows.page_size;
    const int first = (task.first_block + block) * Config::kTokens;
    const int token = first - static_cast<int>(page_size.quotient(first) * page_size.divisor());
    const auto load = [&](std::uint8_t (*to)[Config::kBlockBytes], int count, ptx::Mbarrier& full,
                          int dims) {
      if (!is_there) {
        ptx::mbarrier_arrive(full);
        return;
      }
      ptx::mbarrier_arrive_expect(full, count * Config::kBlockBytes);
      for (int k = 0; k < count; ++k) {
        ptx::tma_load(to[k], maps_.pages, full, (dims + k) * 128, token, page);
      }
    };
#pragma unroll 1
    for (int part = 0; part < Config::kParts; ++part, ring_.next()) {
      if (Config::kRope > 0 && part == Config::kParts - 1) {  // its place is free before this one
        ptx::mbarrier_wait(shared_.empty_rope[rope_ring_.index], rope_ring_.phase ^ 1);
        load(&shared_.rope[rope_ring_.index], 1, shared_.full_rope[rope_ring_.index],
             Config::kDimBlocks);
        rope_ring_.next();
      }
      ptx::Mbarrier& full = next_place();
      if (part == 0) {
        shared_.tokens_of[ring_.index].count =
            is_there ? max(min(task.keys.size() - first, Config::kTokens), 0) : 0;
      }
      load(shared_.kv[ring_.index], Config::kPartBlocks, full, part * Config::kPartBlocks);
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const LatentFwdMaps& maps_;
  LatentFwdRing<Config::kPlaces> ring_;
  LatentFwdRing<Config::kRopePlaces> rope_ring_;
};

}  // namespace dsa::cuda::sm90a
