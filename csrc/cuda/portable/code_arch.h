// SPDX-License-Identifier: Apache-2.0
// For what architecture the portable kernels were compiled that a device runs.
#pragma once

#include "dsa/params.h"

namespace dsa::cuda {

// 10 * major + minor, of SASS or of the PTX that the driver translated; 0: the device loads none of
// this build. Asked until it is known; the runtime answers for the current device alone.
int code_arch(Device device);

}  // namespace dsa::cuda
