// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::ptx {

template <int kBytes>
void cp_async(std::uint32_t shared, const void* global) {
  if (reinterpret_cast<std::uintptr_t>(global) % kBytes != 0) emulator::fail("a misaligned copy");
  emulator::copy_async(shared_pointer(shared, kBytes), global, kBytes);
}
template <int kBytes>
void cp_async_or_zeros(std::uint32_t shared, const void* global, bool valid) {
  if (valid) return cp_async<kBytes>(shared, global);
  emulator::zero_async(shared_pointer(shared, kBytes), kBytes);
}

inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}

}  // namespace dsa::cuda::ptx
