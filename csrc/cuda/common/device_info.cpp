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

DeviceLimits ask(int device) {
  cudaError_t error = cudaSuccess;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  DeviceLimits limits;
  limits.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                attribute(cudaDevAttrComputeCapabilityMinor);
  limits.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_bytes_per_cta =
      static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  if (error == cudaSuccess) return limits;
  cudaGetLastError();  // whoever wants this device reports it
  limits = {};
  limits.error = cudaGetErrorString(error);
  return limits;
}

}  // namespace

const DeviceLimits& device_limits(Device device) {
  static std::once_flag asked[kMaxDevices];
  static DeviceLimits limits[kMaxDevices];
  static const DeviceLimits none = [] {
    DeviceLimits unknown;
    unknown.error = cudaGetErrorString(cudaErrorInvalidDevice);
    return unknown;
  }();
  if (device.index < 0 || device.index >= kMaxDevices) return none;
  std::call_once(asked[device.index], [&] { limits[device.index] = ask(device.index); });
  return limits[device.index];
}

std::string arch_refusal(const char* wanted, Device device) {
  const DeviceLimits& limits = device_limits(device);
  if (limits.error != nullptr) return std::string("cudaDeviceGetAttribute: ") + limits.error;
  return std::string(wanted) + ", not SM" + std::to_string(limits.arch);
}

}  // namespace dsa::cuda
