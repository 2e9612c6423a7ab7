// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::ptx {

using Mbarrier = std::uint64_t;

inline void cta_sync() { emulator::barrier_sync(0, emulator::num_threads()); }

inline void mbarrier_init(Mbarrier& barrier, int arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(Mbarrier& barrier) { emulator::mbarrier_arrive(barrier, 1, 0); }
inline void mbarrier_arrive(Mbarrier& barrier, std::uint32_t count) {
  emulator::mbarrier_arrive(barrier, count, 0);
}
inline void mbarrier_arrive_expect(Mbarrier& barrier, std::uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, 1, bytes);
}
inline void mbarrier_arrive_after_cp_async(Mbarrier& barrier) {
  emulator::arrive_after_copies(barrier);
}
inline void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}

}  // namespace dsa::cuda::ptx
