// SPDX-License-Identifier: Apache-2.0
#include "cuda/portable/code_arch.h"

#include <cuda_runtime.h>

#include <atomic>

#include "cuda/common/device_info.h"

namespace dsa::cuda {

namespace {

__global__ void portable_probe_kernel() {}

}  // namespace

int code_arch(Device device) {
  static std::atomic<int> known[kMaxDevices] = {};
  std::atomic<int>& arch = known[device.index % kMaxDevices];
  if (const int answer = arch.load(std::memory_order_relaxed); answer != 0) return answer;
  int current = 0;
  cudaFuncAttributes attributes{};
  const bool loads = cudaGetDevice(&current) == cudaSuccess &&
                     cudaSetDevice(device.index) == cudaSuccess &&
                     cudaFuncGetAttributes(&attributes, portable_probe_kernel) == cudaSuccess;
  if (cudaSetDevice(current) != cudaSuccess || !loads) {
    cudaGetLastError();
    return 0;
  }
  arch.store(attributes.ptxVersion, std::memory_order_relaxed);
  return attributes.ptxVersion;
}

}  // namespace dsa::cuda
