// SPDX-License-Identifier: Apache-2.0
// Launching a kernel: every call is checked and becomes a Status; nothing synchronises.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
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

// Lets a kernel have so many bytes of dynamic shared memory on a device, or more.
template <auto kKernel>
Status allow_shared_bytes(const char* name, Device device, std::size_t bytes) {
  if (bytes <= kDefaultSharedBytes) return {};
  static std::atomic<std::size_t> opted_in[kMaxDevices] = {};
  static std::mutex mutex;
  std::atomic<std::size_t>& most = opted_in[device.index % kMaxDevices];
  if (most.load(std::memory_order_acquire) >= bytes) return {};
  const std::lock_guard lock(mutex);  // a thread that wants less must not set it after this one
  if (most.load(std::memory_order_relaxed) >= bytes) return {};
  const Status status =
      to_status(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)),
                name);
  if (status.ok()) most.store(bytes, std::memory_order_release);
  return status;
}

// kKernel<<<grid, threads, shared_bytes, launch.stream>>>(args...). An empty grid is no launch.
template <auto kKernel, typename... Args>
Status launch(const char* name, const Launch& where, dim3 grid, int threads,
              std::size_t shared_bytes, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  const Status allowed = allow_shared_bytes<kKernel>(name, where.device, shared_bytes);
  if (!allowed.ok()) return allowed;
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(where.stream)>>>(args...);
  return to_status(cudaGetLastError(), name);
}

inline Status clear_async(const Launch& where, void* data, std::size_t bytes) {
  return to_status(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(where.stream)),
                   "cudaMemsetAsync");
}

inline constexpr int kMaxCluster = 16;

// A launch in clusters of `cluster` CTAs, of which the grid is a multiple.
struct ClusterLaunch {
  dim3 grid;
  dim3 cluster;
  int threads;
  std::size_t shared_bytes;

  int cluster_size() const { return static_cast<int>(cluster.x * cluster.y * cluster.z); }
};

// use(config), the runtime's form of `shape`, after what it asks for has been allowed.
template <auto kKernel, typename Use>
Status with_cluster_config(const char* name, const Launch& where, const ClusterLaunch& shape,
                           Use&& use) {
  constexpr int kPortableSize = 8;  // more are not there on every GPU that has clusters
  const Status allowed = allow_shared_bytes<kKernel>(name, where.device, shape.shared_bytes);
  if (!allowed.ok()) return allowed;
  if (shape.cluster_size() > kPortableSize) {
    const Status larger = to_status(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    if (!larger.ok()) return larger;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return to_status(use(config), name);
}

template <auto kKernel, typename... Args>
Status launch_clusters(const char* name, const Launch& where, const ClusterLaunch& shape,
                       const Args&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
  return with_cluster_config<kKernel>(name, where, shape, [&](const cudaLaunchConfig_t& config) {
    return cudaLaunchKernelEx(&config, kKernel, args...);
  });
}

// How many clusters a device runs at a time; 0 if it cannot tell, or if its code of the kernel
// comes from PTX without clusters. Asked once a size, for kernels whose registers, not their shared
// memory, limit the CTAs of an SM.
template <auto kKernel>
int clusters_at_once(const char* name, const Launch& where, const ClusterLaunch& shape) {
  constexpr int kFirstWithClusters = 90;
  static std::atomic<int> known[kMaxDevices][kMaxCluster + 1] = {};  // and one
  std::atomic<int>& entry = known[where.device.index % kMaxDevices][shape.cluster_size()];
  const int plus_one = entry.load(std::memory_order_relaxed);
  if (plus_one > 0) return plus_one - 1;
  int count = 0;
  const Status status =
      with_cluster_config<kKernel>(name, where, shape, [&](const cudaLaunchConfig_t& config) {
        cudaFuncAttributes code{};
        const cudaError_t error = cudaFuncGetAttributes(&code, kKernel);
        if (error != cudaSuccess || code.ptxVersion < kFirstWithClusters) return error;
        return cudaOccupancyMaxActiveClusters(&count, kKernel, &config);
      });
  if (!status.ok()) return 0;
  entry.store(count + 1, std::memory_order_relaxed);
  return count;
}

}  // namespace dsa::cuda
