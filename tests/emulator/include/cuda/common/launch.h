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

template <auto kKernel, typename... Args>
Status launch(const char* name, const Launch&, dim3 grid, int threads, std::size_t shared_bytes,
              const Args&... args) {
  if (shared_bytes > emulator::kSharedBytes) return Status::internal("too much shared memory");
  const Status status =
      emulator::run_grid({grid.x, grid.y, grid.z}, threads, [&] { kKernel(args...); });
  return status.ok() ? status : Status::internal(std::string(name) + ": " + status.message());
}

}  // namespace dsa::cuda
