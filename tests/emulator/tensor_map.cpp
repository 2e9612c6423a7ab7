// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/tensor_map.h"

#include <cstring>

namespace dsa::cuda {

Status make_tensor_map(const ByteTensor& tensor, CUtensorMap& map) {
  static_assert(sizeof(tensor) <= sizeof(map));
  std::memcpy(&map, &tensor, sizeof(tensor));
  return {};
}

}  // namespace dsa::cuda
