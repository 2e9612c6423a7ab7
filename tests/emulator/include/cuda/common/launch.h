// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "cuda/common/device_info.h"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

inline constexpr std::int64_t kMaxGridX = (std::int64_t{1} << 31) - 1;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

inline Status clear_async(const Launch&, void* data, std::size_t bytes) {
  std::memset(data, 0, bytes);
  return {};
}

inline constexpr int kMaxCluster = 16;

struct ClusterLaunch {
  dim3 grid;
  dim3 cluster;
  int threads;
  std::size_t shared_bytes;
};

template <auto kKernel, typename... Args>
Status launch_clusters(const char* name, const Launch&, const ClusterLaunch& shape,
                       const Args&... args) {
  if (shape.shared_bytes > emulator::kSharedBytes) {
    return Status::internal("too much shared memory");
  }
  const dim3& grid = shape.grid;
  const Status status = emulator::run_grid({grid.x, grid.y, grid.z}, shape.cluster.y, shape.threads,
                                           [&] { kKernel(args...); });
  return status.ok() ? status : Status::internal(std::string(name) + ": " + status.message());
}

template <auto kKernel, typename... Args>
Status launch(const char* name, const Launch& where, dim3 grid, int threads,
              std::size_t shared_bytes, const Args&... args) {
  return launch_clusters<kKernel>(name, where, {grid, dim3(1), threads, shared_bytes}, args...);
}

template <auto kKernel>
int clusters_at_once(const char*, const Launch&, const ClusterLaunch&) {
  return emulator::kNumSms;
}

}  // namespace dsa::cuda
