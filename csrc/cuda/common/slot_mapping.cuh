// SPDX-License-Identifier: Apache-2.0
// The slots that a cache write goes to.
#pragma once

#include <cstdint>

#include "dsa/params.h"

namespace dsa::cuda {

// slot_mapping i32 | i64 [T]; a slot outside the cache, as of a token to skip, gives -1.
__device__ __forceinline__ std::int64_t read_slot(const TensorView& slot_mapping,
                                                  std::int64_t token, std::int64_t num_slots) {
  const std::int64_t offset = token * slot_mapping.stride(0);
  const std::int64_t slot = slot_mapping.dtype == DType::kInt32
                                ? slot_mapping.ptr<const std::int32_t>()[offset]
                                : slot_mapping.ptr<const std::int64_t>()[offset];
  return slot >= 0 && slot < num_slots ? slot : -1;
}

}  // namespace dsa::cuda
