// SPDX-License-Identifier: Apache-2.0
#include "dispatch/heuristics.h"

#if DSA_WITH_CUDA
#include "cuda/common/device_info.h"
#endif

namespace dsa {

bool e4m3_products_are_widened([[maybe_unused]] Device device) {
#if DSA_WITH_CUDA
  const int arch = cuda::device_limits(device).arch;
  return arch != 89 && arch < 120;
#else
  return true;
#endif
}

}  // namespace dsa
