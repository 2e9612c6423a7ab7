// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/device_info.h"

#include <cuda_runtime_api.h>

#include <mutex>

namespace dsa::cuda {

const char* toolkit_version() { return DSA_CUDA_TOOLKIT; }

std::vector<DeviceInfo> device_infos() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device is an answer here, not a failure to report later
    return {};
  }
  std::vector<DeviceInfo> infos;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp prop;
    if (cudaGetDeviceProperties(&prop, device) != cudaSuccess) continue;
    infos.push_back({prop.name, 10 * prop.major + prop.minor, prop.multiProcessorCount});
  }
  return infos;
}

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return value;
}

}  // namespace

const DeviceLimits& device_limits(Device device) {
  static std::once_flag asked[kMaxDevices];
  static DeviceLimits limits[kMaxDevices];
  const int slot = device.index % kMaxDevices;
  std::call_once(asked[slot], [&] {
    DeviceLimits& l = limits[slot];
    l.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device.index) +
             attribute(cudaDevAttrComputeCapabilityMinor, device.index);
    l.num_sms = attribute(cudaDevAttrMultiProcessorCount, device.index);
    l.shared_bytes_per_cta =
        static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  });
  return limits[slot];
}

}  // namespace dsa::cuda
