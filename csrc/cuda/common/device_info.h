// SPDX-License-Identifier: Apache-2.0
// What CUDA devices this process can see. Asks the driver only; creates no context.
#pragma once

#include <string>
#include <vector>

namespace dsa::cuda {

struct DeviceInfo {
  std::string name;
  int arch;  // 10 * major + minor
  int num_sms;
};

const char* toolkit_version();           // of the build
std::vector<DeviceInfo> device_infos();  // empty without a driver or a device

}  // namespace dsa::cuda
