// SPDX-License-Identifier: Apache-2.0
// Token -> slot through a block table whose entries are not to be trusted, and row -> request. Host
// and device.
#pragma once

#include <cstdint>
#include <limits>

#include "dsa/params.h"

namespace dsa {

inline constexpr std::int64_t kInvalidSlot = -1;
inline constexpr std::int64_t kUnknownPages = std::numeric_limits<std::int64_t>::max();

// A slot or index as the int32 that outputs hold, or -1 where it does not fit.
DSA_HOST_DEVICE inline std::int32_t narrow_or_invalid(std::int64_t index) {
  const auto narrow = static_cast<std::int32_t>(index);
  return narrow == index ? narrow : static_cast<std::int32_t>(kInvalidSlot);
}

// a / b, of numbers from 0 on; b > 0. A GPU divides 32 bits in a fifth of the time.
DSA_HOST_DEVICE inline std::int64_t quotient(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

// One request's row of a block table.
struct PageTableRow {
  const std::int32_t* entries = nullptr;
  std::int64_t width = 0;
  std::int64_t page_size = 1;
  std::int64_t num_pages = kUnknownPages;

  // The cache page that holds logical page `index` of the request, or -1 when none does.
  DSA_HOST_DEVICE std::int64_t page(std::int64_t index) const {
    if (index < 0 || index >= width) return -1;
    const std::int64_t entry = entries[index];
    return entry >= 0 && entry < num_pages ? entry : -1;
  }

  // page * page_size + offset of the token, or -1 when it is not mapped.
  DSA_HOST_DEVICE std::int64_t slot(std::int64_t token) const {
    if (token < 0) return kInvalidSlot;
    const std::int64_t index = quotient(token, page_size);
    const std::int64_t cache_page = page(index);
    return cache_page < 0 ? kInvalidSlot : cache_page * page_size + (token - index * page_size);
  }
};

// A block table i32 [B, P] whose rows are contiguous.
struct PageTable {
  TensorView block_table;
  std::int64_t page_size = 1;
  std::int64_t num_pages = kUnknownPages;

  // The row of a request; of a request outside [0, B), a row that maps nothing.
  DSA_HOST_DEVICE PageTableRow row(std::int64_t request) const {
    if (request < 0 || request >= block_table.size(0) || block_table.size(1) == 0) return {};
    const std::int32_t* entries =
        block_table.ptr<const std::int32_t>() + request * block_table.stride(0);
    return {entries, block_table.size(1), page_size, num_pages};
  }
};

// The request of each of `num_rows` rows: row_to_request where given, else equal runs of rows.
struct RequestOfRow {
  TensorView row_to_request;  // i32 [num_rows], optional
  std::int64_t num_rows = 0;
  std::int64_t num_requests = 0;

  DSA_HOST_DEVICE std::int64_t operator()(std::int64_t row) const {
    if (row_to_request.defined()) {
      return row_to_request.ptr<const std::int32_t>()[row * row_to_request.stride(0)];
    }
    const std::int64_t rows_per_request = num_requests > 0 ? quotient(num_rows, num_requests) : 0;
    return rows_per_request > 0 ? quotient(row, rows_per_request) : -1;
  }
};

}  // namespace dsa
