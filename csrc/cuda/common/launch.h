// SPDX-License-Identifier: Apache-2.0
// Launching a kernel: every call is checked and becomes a Status; nothing synchronises.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/common/device_info.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

inline constexpr std::int64_t kMaxGridX = (std::int64_t{1} << 31) - 1;
inline constexpr std::int64_t kMaxGridYZ = 65535;
inline constexpr std::size_t kDefaultSharedBytes = 48 * 1024;

template <typename T>
DSA_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
DSA_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

inline Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it is reported here, once
  return Status::internal(std::string(what) + ": " + cudaGetErrorString(error));
}

// kKernel<<<grid, threads, shared_bytes, launch.stream>>>(args...). An empty grid is no launch.
template <auto kKernel, typename... Args>
Status launch(const char* name, const Launch& where, dim3 grid, int threads,
              std::size_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (shared_bytes > kDefaultSharedBytes) {
    // Once a device is enough; a kernel always asks for the same or less than its first maximum.
    static std::atomic<std::size_t> opted_in[kMaxDevices] = {};
    std::atomic<std::size_t>& most = opted_in[where.device.index % kMaxDevices];
    if (most.load(std::memory_order_relaxed) < shared_bytes) {
      Status status =
          to_status(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_bytes)),
                    name);
      if (!status.ok()) return status;
      most.store(shared_bytes, std::memory_order_relaxed);
    }
  }
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(where.stream)>>>(args...);
  return to_status(cudaGetLastError(), name);
}

}  // namespace dsa::cuda
