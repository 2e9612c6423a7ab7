// SPDX-License-Identifier: Apache-2.0
// Which rows of the latent cache a query token attends to. Nothing that memory says (lengths,
// slots, pages) is trusted.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"

namespace dsa::cuda {

struct KeyRow {
  const std::uint8_t* values = nullptr;  // nullptr: no valid row
  const std::uint8_t* scales = nullptr;  // of FP8 rows
};

// Token `position` of what begins `pages` whole pages before, in page `page` of the cache.
__device__ __forceinline__ KeyRow row_of_page(const LatentRows& rows, std::int64_t page,
                                              std::int64_t position, std::int64_t pages) {
  const std::int64_t token = position - pages * rows.page_size.divisor();
  const std::uint8_t* base = rows.data + page * rows.page_stride;
  return {base + token * rows.token_stride, base + rows.scales_offset + token * rows.scales_stride};
}

// A slot of 0 or more.
__device__ __forceinline__ KeyRow row_of_slot(const LatentRows& rows, std::int32_t slot) {
  if (slot >= rows.num_slots) return {};
  const std::uint32_t page = rows.page_size.quotient(slot);
  return row_of_page(rows, page, slot, page);
}

// How many of a query token's slots count.
__device__ __forceinline__ int list_size(const SlotList& list, std::int64_t b, std::int64_t j) {
  if (list.length == nullptr) return list.count;
  const int length = list.length[b * list.length_stride_b + j * list.length_stride_j];
  return max(0, min(length, list.count));
}

// The keys of one query token, numbered 0 .. size: the two lists one after the other, or the first
// tokens of the request. In shared memory, to leave registers to the tile.
class KeySequence {
 public:
  __device__ void init(const AttentionArgs& args, std::int64_t b, std::int64_t j) {
    if (args.block_table != nullptr) {
      slots_[0] = args.block_table + b * args.table_stride;
      const std::int64_t most = args.table_width * args.lists[0].rows.page_size.divisor();
      std::int64_t length = args.seqlens[b * args.seqlens_stride];
      length = max(std::int64_t{0}, min(length, most));
      if (args.causal) length = max(std::int64_t{0}, length - args.tokens_per_request + 1 + j);
      size_ = first_ = static_cast<int>(length);
      return;
    }
    first_ = list_size(args.lists[0], b, j);
    size_ = first_ + list_size(args.lists[1], b, j);
    slots_[0] = args.lists[0].slots + b * args.lists[0].stride_b + j * args.lists[0].stride_j;
    slots_[1] = args.lists[1].slots + b * args.lists[1].stride_b + j * args.lists[1].stride_j;
  }

  __device__ int size() const { return size_; }

  // What memory says about a key: its slot, or the page of a dense request.
  __device__ std::int32_t fetch(const AttentionArgs& args, int key) const {
    if (key >= size_) return -1;
    if (args.block_table != nullptr) {
      return slots_[0][args.lists[0].rows.page_size.quotient(key)];
    }
    return key < first_ ? slots_[0][key] : slots_[1][key - first_];
  }

  // The row that `fetched` stands for.
  __device__ KeyRow row(const AttentionArgs& args, int key, std::int32_t fetched) const {
    if (key >= size_ || fetched < 0) return {};
    if (args.block_table != nullptr) {
      const LatentRows& rows = args.lists[0].rows;
      const std::uint32_t logical = rows.page_size.quotient(key);
      return fetched < rows.num_pages ? row_of_page(rows, fetched, key, logical) : KeyRow{};
    }
    return key < first_ ? row_of_slot(args.lists[0].rows, fetched)
                        : row_of_slot(args.lists[1].rows, fetched);
  }

 private:
  const std::int32_t* slots_[2];  // of a dense request: its pages
  int first_;                     // keys of the first list
  int size_;
};

}  // namespace dsa::cuda
