// SPDX-License-Identifier: Apache-2.0
// The 16-bit attention kernel's producer: four warps copy rows of latents, 16 bytes a lane.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/named_barrier.cuh"

namespace dsa::cuda::sm90a {

// A row's 128 bytes are eight lanes'; a thread has four rows of a block.
template <typename Config>
class LatentFwdProducer {
 public:
  using SharedStorage = typename Config::SharedStorage;

  __device__ LatentFwdProducer(SharedStorage& shared, const AttentionArgs& args, int thread)
      : shared_(shared), args_(args), chunk_(thread % 8), row_(thread / 8) {}

  __device__ void run() {
    const int blocks = (shared_.blocks + 1) / 2 * 2;
    std::int32_t fetched[kRows];
    fetch(0, fetched);
    for (int n = 0; n < blocks; ++n) {
      const std::uint8_t* rows[kRows];
      bool all = true;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows[i] =
            n < shared_.blocks ? shared_.keys.row(args_, key(n, i), fetched[i]).values : nullptr;
        all &= rows[i] != nullptr;
      }
      const bool lacks = named_any<LatentFwdBarrier::kProducer, Config::kProducerThreads>(!all);
      fetch(n + 1, fetched);
      const int buffer = n % 2;
      const std::uint32_t phase = n / 2 % 2;
      for (int part = 0; part < Config::kParts; ++part) {
        ptx::mbarrier_wait(shared_.empty[buffer][part], phase ^ 1);
        if (part == 0) note_valid(buffer, rows, lacks);
        for (int k = 0; k < Config::dim_blocks(part); ++k) {
          copy(buffer, Config::first_dim_block(part) + k, rows);
        }
        ptx::mbarrier_arrive_after_cp_async(shared_.full[buffer][part]);
        if (part == 0) ptx::mbarrier_arrive(shared_.full[buffer][part]);
      }
    }
  }

 private:
  static constexpr int kRowsAtOnce = Config::kProducerThreads / 8;
  static constexpr int kRows = Config::kTokens / kRowsAtOnce;  // of a thread

  __device__ int key(int n, int i) const {
    return (shared_.first_block + n) * Config::kTokens + row_ + i * kRowsAtOnce;
  }

  __device__ void fetch(int n, std::int32_t (&fetched)[kRows]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) fetched[i] = shared_.keys.fetch(args_, key(n, i));
  }

  __device__ void note_valid(int buffer, const std::uint8_t* const (&rows)[kRows], bool lacks) {
    if (chunk_ == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        shared_.valid[buffer][row_ + i * kRowsAtOnce] = rows[i] != nullptr ? 1 : 0;
      }
      if (row_ == 0) shared_.all_valid[buffer] = !lacks;
    }
  }

  __device__ void copy(int buffer, int dim_block, const std::uint8_t* const (&rows)[kRows]) const {
    const std::uint32_t to =
        ptx::shared_address(shared_.kv[buffer][dim_block]) + row_ * 128 + (chunk_ ^ row_ % 8) * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      ptx::cp_async_or_zeros<16>(to + i * kRowsAtOnce * 128,
                                 rows[i] + dim_block * 128 + chunk_ * 16, rows[i] != nullptr);
    }
  }

  SharedStorage& shared_;
  const AttentionArgs& args_;
  const int chunk_, row_;
};

}  // namespace dsa::cuda::sm90a
