// SPDX-License-Identifier: Apache-2.0
// What launches ask of the CUDA runtime and the driver.
#include <cstring>

#include "cuda/common/launch_counter.h"
#include "cuda/common/tensor_map.h"

namespace dsa::cuda {

Status make_tensor_map(const ByteTensor& tensor, CUtensorMap& map) {
  static_assert(sizeof(tensor) <= sizeof(map));
  std::memcpy(&map, &tensor, sizeof(tensor));
  return {};
}

std::uint32_t launch_counter(const Launch&) { return 0; }

}  // namespace dsa::cuda
