// SPDX-License-Identifier: Apache-2.0
// Writing tokens to the slots of a cache in parallel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tensor_rows.h"
#include "dsa/parallel.h"
#include "dsa/params.h"

namespace dsa::cpu {

inline std::int64_t read_slot(const TensorView& slot_mapping, std::int64_t token) {
  const std::int64_t offset = token * slot_mapping.stride(0);
  return slot_mapping.dtype == DType::kInt32 ? slot_mapping.ptr<const std::int32_t>()[offset]
                                             : slot_mapping.ptr<const std::int64_t>()[offset];
}

// Calls write(token, slot) for each token whose slot lies in [0, num_slots). Threads share the
// work by slot, not by token, so that of tokens with one slot the last wins, whatever the threads,
// and none race.
template <typename Write>
void for_each_slot(const TensorView& slot_mapping, std::int64_t num_slots,
                   std::int64_t elements_per_token, Write&& write) {
  constexpr std::int64_t kMaxShards = 64;
  constexpr std::int64_t kRun = 16;  // slots in a row of one shard: neighbours share cache lines
  const std::int64_t num_tokens = slot_mapping.size(0);
  const std::int64_t num_shards =
      std::clamp<std::int64_t>(num_tokens / row_grain(elements_per_token), 1, kMaxShards);
  parallel_for(0, num_shards, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = 0; token < num_tokens; ++token) {
      const std::int64_t slot = read_slot(slot_mapping, token);
      if (slot < 0 || slot >= num_slots) continue;
      const std::int64_t shard = slot / kRun % num_shards;
      if (shard >= begin && shard < end) write(token, slot);
    }
  });
}

}  // namespace dsa::cpu
