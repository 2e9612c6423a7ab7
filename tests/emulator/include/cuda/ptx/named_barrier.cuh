// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dsa::cuda::ptx {

template <int kBarrier, int kThreads>
void named_sync() {
  static_assert(kBarrier < 16 && kThreads % 32 == 0);
  emulator::barrier_sync(kBarrier, kThreads);
}
template <int kBarrier, int kThreads>
void named_arrive() {
  static_assert(kBarrier < 16 && kThreads % 32 == 0);
  emulator::barrier_arrive(kBarrier, kThreads);
}
template <int kBarrier, int kThreads>
bool named_any(bool flag) {
  return emulator::barrier_any(kBarrier, kThreads, flag);
}

}  // namespace dsa::cuda::ptx
