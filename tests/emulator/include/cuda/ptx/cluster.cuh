// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dsa::cuda::ptx {

inline std::uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <typename T>
T& of_cta(T& shared, std::uint32_t rank) {
  return *reinterpret_cast<T*>(emulator::of_cta(&shared, rank));
}

}  // namespace dsa::cuda::ptx
