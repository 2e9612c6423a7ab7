// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dsa/params.h"

namespace dsa::cuda {

inline constexpr int kMaxDevices = 64;

struct DeviceLimits {
  int arch = 90;
  int num_sms = emulator::kNumSms;
  std::size_t shared_bytes_per_cta = emulator::kSharedBytes;
};
inline DeviceLimits device_limits(Device) { return {}; }

}  // namespace dsa::cuda
