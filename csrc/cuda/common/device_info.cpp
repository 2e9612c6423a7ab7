// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/device_info.h"

#include <cuda_runtime_api.h>

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

}  // namespace dsa::cuda
