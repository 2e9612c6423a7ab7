// SPDX-License-Identifier: Apache-2.0
// A row of topk_select: its window, and how selected columns become indices or slots, and scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/page_table.h"
#include "cuda/ptx/ldst.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

// An optional i32 [R].
__device__ inline std::int32_t value_or(const TensorView& values, std::int64_t row,
                                        std::int32_t otherwise) {
  return values.defined() ? values.ptr<const std::int32_t>()[row * values.stride(0)] : otherwise;
}

struct RowWindow {
  int begin;
  int end;  // at least begin

  __device__ RowWindow(const TopkSelectParams& params, std::int64_t row) {
    const auto columns = static_cast<std::int32_t>(params.scores.size(1));  // fewer than 2^31
    begin = std::max(value_or(params.row_starts, row, 0), 0);
    end = std::max(std::min(value_or(params.row_ends, row, columns), columns), begin);
  }

  __device__ int size() const { return end - begin; }
};

template <typename Score>
class OutputRow {
 public:
  __device__ OutputRow(const TopkSelectParams& params, std::int64_t row)
      : row_(params.scores.ptr<const typename Score::Bits>() + row * params.scores.stride(0)),
        column_stride_(params.scores.stride(1)),
        base_(value_or(params.index_base, row, static_cast<std::int32_t>(params.index_base_scalar))),
        as_slots_(params.block_table.defined()),
        indices_(params.indices.ptr<std::int32_t>() + row * params.indices.stride(0)) {
    if (params.out_scores.defined()) {
      scores_ = params.out_scores.ptr<float>() + row * params.out_scores.stride(0);
    }
    if (as_slots_) {
      const RequestOfRow request_of_row{params.row_to_request, params.scores.size(0),
                                        params.block_table.size(0)};
      pages_ = PageTable{params.block_table, params.page_size}.row(request_of_row(row));
    }
  }

  __device__ std::int32_t* indices() const { return indices_; }

  // Brings the request's first pages into L2, a line for each thread, for write_all() later on.
  __device__ void prefetch_pages() const {
    const std::int64_t entry = std::int64_t{threadIdx.x} * kLineEntries;
    if (as_slots_ && entry < pages_.width) ptx::prefetch_l2(pages_.entries + entry);
  }

  __device__ void write(std::int64_t i, std::int64_t column) const {
    indices_[i] = index(column);
    if (scores_ != nullptr) scores_[i] = Score::to_float(row_[column * column_stride_]);
  }

  // [0, count) by a CTA of kThreads; column(i). Entries of the page table are asked for together.
  template <int kThreads, typename Column>
  __device__ void write_all(std::uint32_t count, Column&& column) const {
    constexpr int kTogether = 4;
    for (std::uint32_t first = threadIdx.x; first < count; first += kTogether * kThreads) {
      std::int32_t indices[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * kThreads;
        if (i < count) indices[j] = index(column(i));
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * kThreads;
        if (i < count) indices_[i] = indices[j];
      }
    }
    if (scores_ == nullptr) return;
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) {
      scores_[i] = Score::to_float(row_[column(i) * column_stride_]);
    }
  }

  // Nothing is there.
  __device__ void pad(std::int64_t i) const {
    indices_[i] = static_cast<std::int32_t>(kInvalidSlot);
    if (scores_ != nullptr) scores_[i] = -std::numeric_limits<float>::infinity();
  }

 private:
  static constexpr int kLineEntries = 128 / sizeof(std::int32_t);

  __device__ std::int32_t index(std::int64_t column) const {
    const std::int64_t index = base_ + column;
    return narrow_or_invalid(as_slots_ ? pages_.slot(index) : index);
  }

  const typename Score::Bits* row_;
  std::int64_t column_stride_;
  std::int64_t base_;
  bool as_slots_;
  PageTableRow pages_;
  std::int32_t* indices_;
  float* scores_ = nullptr;
};

}  // namespace dsa::cuda::topk
