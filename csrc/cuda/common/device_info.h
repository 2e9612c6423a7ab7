// SPDX-License-Identifier: Apache-2.0
// What CUDA devices this process can see. Asks the driver only; creates no context.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "dsa/params.h"

namespace dsa::cuda {

struct DeviceInfo {
  std::string name;
  int arch;  // 10 * major + minor
  int num_sms;
};

const char* toolkit_version();           // of the build
std::vector<DeviceInfo> device_infos();  // empty without a driver or a device

inline constexpr int kMaxDevices = 64;

// What a launch is sized by; asked of the driver once a device.
struct DeviceLimits {
  int arch = 0;  // 10 * major + minor; 0: the device could not be asked, error says why
  int num_sms = 0;
  std::size_t shared_bytes_per_cta = 0;  // the opt-in maximum
  const char* error = nullptr;           // cudaGetErrorString's
};
const DeviceLimits& device_limits(Device device);

// Why a device is none of `wanted`: "SM80 or newer, not SM75", or that it could not be asked.
std::string arch_refusal(const char* wanted, Device device);

}  // namespace dsa::cuda
