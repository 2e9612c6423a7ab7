// SPDX-License-Identifier: Apache-2.0
// Row of a packed (ragged) batch -> slot of a paged cache, with neither cu_seqlens nor the block
// table trusted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/page_table.h"
#include "dsa/params.h"

namespace dsa::cpu {

// A row belongs to the last request b with cu_seqlens[b] <= row, and to none unless row <
// cu_seqlens[b + 1].
class RaggedSlots {
 public:
  // cu_seqlens: i32 [B + 1].
  RaggedSlots(const TensorView& cu_seqlens, const PageTable& table)
      : cu_seqlens_(cu_seqlens), table_(table), least_begin_(num_requests()) {
    std::int64_t least = std::numeric_limits<std::int32_t>::max();
    for (std::size_t request = least_begin_.size(); request-- > 0;) {
      least = std::min(least, begin(static_cast<std::int64_t>(request)));
      least_begin_[request] = static_cast<std::int32_t>(least);
    }
  }

  // The slot of a row, or -1.
  std::int64_t slot(std::int64_t row) const {
    // least_begin_ ascends even where cu_seqlens does not, and last drops to <= row where
    // cu_seqlens does.
    const auto past = std::upper_bound(least_begin_.begin(), least_begin_.end(), row);
    if (past == least_begin_.begin()) return kInvalidSlot;
    const std::int64_t request = past - least_begin_.begin() - 1;
    if (row >= begin(request + 1)) return kInvalidSlot;
    return table_.row(request).slot(row - begin(request));
  }

 private:
  std::size_t num_requests() const { return static_cast<std::size_t>(cu_seqlens_.size(0) - 1); }
  std::int64_t begin(std::int64_t request) const {
    return cu_seqlens_.ptr<const std::int32_t>()[request * cu_seqlens_.stride(0)];
  }

  TensorView cu_seqlens_;
  PageTable table_;
  std::vector<std::int32_t> least_begin_;  // [b]: the least of cu_seqlens[b..B-1]
};

}  // namespace dsa::cpu
