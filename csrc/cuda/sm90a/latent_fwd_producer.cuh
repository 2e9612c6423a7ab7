// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's producer: four warps copy rows of latents, 16 bytes a lane, or one
// thread whole blocks of a page.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/named_barrier.cuh"

namespace dsa::cuda::sm90a {

// A thread looks up a row of a block; then it copies 16 of each 128 bytes of four rows.
template <typename Config>
class LatentFwdProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  // by_pages: `pages` is the cache of dense requests, whose blocks lie in one page each.
  __device__ LatentFwdProducer(SharedStorage& shared, const AttentionArgs& args,
                               const CUtensorMap& pages, bool by_pages, int thread)
      : shared_(shared), args_(args), pages_(pages), by_pages_(by_pages), thread_(thread) {}

  __device__ void run() {
    std::int32_t fetched = fetch(0);
    for (int n = 0; n < (shared_.blocks + 1) / 2 * 2; ++n) {
      const std::int32_t slot = fetched;
      fetched = fetch(n + 1);
      if (is_whole(n, slot)) {
        if (thread_ == 0) load(n, slot);
        __syncwarp();
        // As in copy: rows of the block before have been read.
        named_sync<LatentFwdBarrier::kProducer, Config::kProducerThreads>();
      } else {
        copy(n, slot);
      }
    }
  }

 private:
  static constexpr int kRowsAtOnce = Config::kProducerThreads / 8;
  static constexpr int kRows = Config::kTokens / kRowsAtOnce;  // of a thread

  // The row that this thread looks up; two threads have the same.
  __device__ int row() const { return thread_ % Config::kTokens; }
  __device__ int key(int n) const { return (shared_.first_block + n) * Config::kTokens + row(); }
  __device__ std::int32_t fetch(int n) const { return shared_.keys.fetch(args_, key(n)); }

  // Whether a block is all of tokens of one page, which is there.
  __device__ bool is_whole(int n, std::int32_t page) const {
    return by_pages_ && n < shared_.blocks &&
           (shared_.first_block + n + 1) * Config::kTokens <= shared_.keys.size() && page >= 0 &&
           page < args_.lists[0].rows.num_pages;
  }

  // By one thread, which has the copy engine load a block and arrives for all.
  __device__ void load(int n, std::int32_t page) const {
    const int buffer = n % 2;
    const std::uint32_t phase = n / 2 % 2;
    const int page_size = static_cast<int>(args_.lists[0].rows.page_size.divisor());
    const int token = (shared_.first_block + n) * Config::kTokens % page_size;
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::Mbarrier& full = shared_.full[buffer][part];
      ptx::mbarrier_wait(shared_.empty[buffer][part], phase ^ 1);
      if (part == 0) shared_.all_valid[buffer] = true;
      ptx::mbarrier_arrive(full, Config::full_arrivals(part) - 1);
      ptx::mbarrier_arrive_expect(full, Config::dim_blocks(part) * Config::kBlockBytes);
      for (int k = 0; k < Config::dim_blocks(part); ++k) {
        const int block = Config::first_dim_block(part) + k;
        ptx::tma_load(shared_.kv[buffer][block], pages_, full, block * 128, token, page);
      }
    }
  }

  // By all threads, row by row; zeros where there is none.
  __device__ void copy(int n, std::int32_t slot) const {
    const int buffer = n % 2;
    const std::uint32_t phase = n / 2 % 2;
    const std::uint8_t* own =
        n < shared_.blocks ? shared_.keys.row(args_, key(n), slot).values : nullptr;
    shared_.rows[buffer][row()] = own;
    __syncwarp();
    const bool lacks =
        named_any<LatentFwdBarrier::kProducer, Config::kProducerThreads>(own == nullptr);
    const int chunk = thread_ % 8, first_row = thread_ / 8;
    const std::uint8_t* rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows[i] = shared_.rows[buffer][first_row + i * kRowsAtOnce];
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::Mbarrier& full = shared_.full[buffer][part];
      ptx::mbarrier_wait(shared_.empty[buffer][part], phase ^ 1);
      for (int k = 0; k < Config::dim_blocks(part); ++k) {
        const int block = Config::first_dim_block(part) + k;
        const std::uint32_t to = ptx::shared_address(shared_.kv[buffer][block]) + first_row * 128 +
                                 (chunk ^ first_row % 8) * 16;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          ptx::cp_async_or_zeros<16>(to + i * kRowsAtOnce * 128, rows[i] + block * 128 + chunk * 16,
                                     rows[i] != nullptr);
        }
      }
      ptx::mbarrier_arrive_after_cp_async(full);
      if (part == 0) {
        shared_.valid[buffer][row()] = own != nullptr ? 1 : 0;
        shared_.all_valid[buffer] = !lacks;
        __syncwarp();
        if (thread_ % 32 == 0) ptx::mbarrier_arrive(full);
      }
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const CUtensorMap& pages_;
  const bool by_pages_;
  const int thread_;
};

}  // namespace dsa::cuda::sm90a
