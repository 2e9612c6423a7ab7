// SPDX-License-Identifier: Apache-2.0
// What a launch of the indexer's logits works on, flat and paged; host and device.
#pragma once

#include <cstdint>

#include "cuda/common/fast_divisor.h"
#include "dsa/host_device.h"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

inline constexpr int kMaxIndexHeads = 128;

// Half-open range of keys, empty if it begins at its end or later. Keys are numbered below 2^31, so
// that a few tiles more still fit.
struct KeyWindow {
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
};

// Where a key stands. `values` is nullptr for a key in no valid page.
struct KeyAddress {
  const std::uint8_t* values = nullptr;  // e4m3 [D]
  const std::uint8_t* scale = nullptr;   // f32
};

// One group of rows over contiguous keys.
struct FlatKeys {
  static constexpr bool kMayMiss = false;

  const std::int32_t* starts;  // [S]
  const std::int32_t* ends;    // [S]
  std::int64_t start_stride;
  std::int64_t end_stride;
  std::int32_t num_keys;
  std::int32_t max_window;    // a window is cut after this many keys
  const std::uint8_t* k;      // e4m3 [L, D]
  const std::uint8_t* scale;  // f32 [L]
  std::int64_t k_stride;      // bytes
  std::int64_t scale_stride;  // bytes

  DSA_HOST_DEVICE KeyWindow window(std::int64_t, std::int64_t row) const {
    return cut(starts[row * start_stride], ends[row * end_stride]);
  }

  // Of all keys that some of the rows see. Eight rows are read together.
  DSA_HOST_DEVICE KeyWindow hull(std::int64_t, std::int64_t first, int rows) const {
    constexpr int kTogether = 8;
    KeyWindow hull{~0u, 0u};
    for (int i = 0; i < rows; i += kTogether) {
      std::int32_t start[kTogether], end[kTogether];
      for (int j = 0; j < kTogether; ++j) {
        const std::int64_t row = first + (i + j < rows ? i + j : 0);
        start[j] = starts[row * start_stride];
        end[j] = ends[row * end_stride];
      }
      for (int j = 0; j < kTogether; ++j) {
        const KeyWindow row = cut(start[j], end[j]);
        if (row.begin >= row.end) continue;
        hull.begin = row.begin < hull.begin ? row.begin : hull.begin;
        hull.end = row.end > hull.end ? row.end : hull.end;
      }
    }
    return hull;
  }

  // A key is found in two steps, so that what the first one reads can be read ahead.
  DSA_HOST_DEVICE std::int32_t look_up(std::int64_t, std::uint32_t) const { return 0; }

  DSA_HOST_DEVICE KeyAddress locate(std::int32_t, std::uint32_t key) const {
    return {k + key * k_stride, scale + key * scale_stride};
  }

 private:
  DSA_HOST_DEVICE KeyWindow cut(std::int32_t start, std::int32_t end) const {
    const std::int32_t first = start > 0 ? start : 0;
    std::int32_t last = end < num_keys ? end : num_keys;
    if (last <= first) return {};
    if (last - first > max_window) last = first + max_window;
    return {static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last)};
  }
};

// A group of rows a request, over the pages of its block table.
struct PagedKeys {
  static constexpr bool kMayMiss = true;

  const std::int32_t* lens;      // [B] or [B, next_n]
  std::int64_t lens_strides[2];  // the second is 0 when lens is [B]
  std::int32_t next_n;
  bool lens_of_rows;          // lens is [B, next_n]
  std::int32_t num_keys;      // at most P * page_size
  const std::int32_t* table;  // [B, P]
  std::int64_t table_stride;
  FastDivisor31 page_size;    // layout.page_size, or more than all keys
  const std::uint8_t* cache;  // [pages][page_stride]
  std::int64_t num_pages;
  std::int64_t page_stride;  // bytes
  IndexerLayout layout;

  DSA_HOST_DEVICE KeyWindow window(std::int64_t request, std::int64_t row) const {
    const std::int32_t len = lens[request * lens_strides[0] + row * lens_strides[1]];
    // Keys that later queries see.
    const auto later = lens_of_rows ? 0 : next_n - 1 - static_cast<std::int32_t>(row);
    if (len <= later) return {};
    const std::int32_t seen = len - later;
    return {0, static_cast<std::uint32_t>(seen < num_keys ? seen : num_keys)};
  }

  DSA_HOST_DEVICE KeyWindow hull(std::int64_t request, std::int64_t first, int rows) const {
    if (!lens_of_rows) return window(request, first + rows - 1);
    KeyWindow hull;
    for (int i = 0; i < rows; ++i) {
      const KeyWindow row = window(request, first + i);
      hull.end = row.end > hull.end ? row.end : hull.end;
    }
    return hull;
  }

  DSA_HOST_DEVICE std::int32_t look_up(std::int64_t request, std::uint32_t key) const {
    return table[request * table_stride + page_size.quotient(key)];
  }

  // In 32 bits, since a longer page holds all keys.
  DSA_HOST_DEVICE std::uint32_t token_of_page(std::uint32_t key) const {
    return key - page_size.quotient(key) * static_cast<std::uint32_t>(layout.page_size);
  }
  DSA_HOST_DEVICE const std::uint8_t* scale(std::int32_t page, std::uint32_t token) const {
    return cache + page * page_stride + layout.scale(token);
  }

  DSA_HOST_DEVICE KeyAddress locate(std::int32_t page, std::uint32_t key) const {
    if (page < 0 || page >= num_pages) return {};
    const std::uint32_t token = token_of_page(key);
    return {cache + page * page_stride + layout.values(token), scale(page, token)};
  }
};

// The arguments of a kernel. Rows of queries come in groups that share their keys. What a kernel
// reads first stands together: each 64 bytes of arguments are fetched when they are first read.
template <typename Keys>
struct MqaTask {
  Keys keys;
  const std::uint8_t* q;      // e4m3 [groups, rows, H, D]
  const float* weights;       // [groups * rows, H]
  void* out;                  // f32 | bf16 [groups * rows, columns]
  std::int64_t q_strides[3];  // group, row, head; bytes
  std::int64_t weights_stride;
  std::int64_t out_stride;
  std::int64_t num_groups;
  std::int64_t rows_per_group;
  std::int64_t columns;
  std::int32_t num_heads;
  std::int32_t q_alignment;  // of all rows: a power of two up to 16
  std::int32_t key_alignment;
  bool out_is_bf16;
  bool columns_are_relative;  // column c is key c of the row's window
  bool clean;                 // -inf outside the windows
  // Set for the launch.
  std::int32_t warps_q_log2;  // warps that hold different queries
  std::int32_t cta_rows;
  std::uint32_t ctas_per_group;
  std::uint32_t chunk_keys;  // keys, and columns to clean, of a CTA
};

}  // namespace dsa::cuda
