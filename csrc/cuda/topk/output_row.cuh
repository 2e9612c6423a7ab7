// SPDX-License-Identifier: Apache-2.0
// A row of topk_select: its window, and how selected columns become indices or slots, and scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/page_table.h"
#include "cuda/common/fast_divisor.h"
#include "dsa/params.h"

namespace dsa::cuda::topk {

// An optional i32 [R].
struct RowInts {
  const std::int32_t* values = nullptr;
  std::int64_t stride = 0;

  RowInts() = default;
  explicit RowInts(const TensorView& t) {
    if (!t.defined()) return;
    values = t.ptr<const std::int32_t>();
    stride = t.stride(0);
  }

  __device__ std::int32_t value_or(std::int64_t row, std::int32_t otherwise) const {
    return values != nullptr ? values[row * stride] : otherwise;
  }
};

// What topk_select works on. A kernel's first look at 64 bytes of its arguments takes as long as
// ten instructions, so those that begin a row stand together, and so do those that end it.
struct TopkTask {
  const void* scores;
  std::int64_t row_stride, column_stride;
  std::int32_t columns;
  std::uint32_t k;
  RowInts starts, ends;

  std::int32_t* indices;
  std::int64_t indices_stride;
  float* out_scores;
  std::int64_t out_scores_stride;
  RowInts bases;
  std::int32_t base;
  bool as_slots;
  bool has_rows;                 // each request
  FastDivisor31 page_size;       // with as_slots
  FastDivisor rows_per_request;  // with as_slots, and without requests
  RowInts requests;
  PageTable pages;
  std::int64_t rows;

  explicit TopkTask(const TopkSelectParams& p)
      : scores(p.scores.data),
        row_stride(p.scores.stride(0)),
        column_stride(p.scores.stride(1)),
        columns(static_cast<std::int32_t>(p.scores.size(1))),  // fewer than 2^31
        k(static_cast<std::uint32_t>(p.topk)),
        starts(p.row_starts),
        ends(p.row_ends),
        indices(p.indices.ptr<std::int32_t>()),
        indices_stride(p.indices.stride(0)),
        out_scores(p.out_scores.defined() ? p.out_scores.ptr<float>() : nullptr),
        out_scores_stride(p.out_scores.defined() ? p.out_scores.stride(0) : 0),
        bases(p.index_base),
        base(static_cast<std::int32_t>(p.index_base_scalar)),
        as_slots(p.block_table.defined()),
        page_size(p.page_size),
        requests(p.row_to_request),
        pages{p.block_table, p.page_size},
        rows(p.scores.size(0)) {
    const std::int64_t num_requests = as_slots ? p.block_table.size(0) : 0;
    const std::int64_t rows_each = num_requests > 0 ? rows / num_requests : 0;
    has_rows = rows_each > 0;
    rows_per_request = FastDivisor(rows_each);
  }

  template <typename Bits>
  __device__ const Bits* row_scores(std::int64_t row) const {
    return static_cast<const Bits*>(scores) + row * row_stride;
  }

  // A negative one has no pages.
  __device__ std::int64_t request(std::int64_t row) const {
    if (requests.values != nullptr) return requests.value_or(row, -1);
    return has_rows ? rows_per_request.quotient(row) : -1;
  }
};

struct RowWindow {
  int begin;
  int end;  // at least begin

  __device__ RowWindow(const TopkTask& task, std::int64_t row) {
    begin = std::max(task.starts.value_or(row, 0), 0);
    end = std::max(std::min(task.ends.value_or(row, task.columns), task.columns), begin);
  }

  __device__ int size() const { return end - begin; }
};

template <typename Score>
class OutputRow {
 public:
  __device__ OutputRow(const TopkTask& task, std::int64_t row)
      : task_(task),
        row_(row),
        base_(task.bases.value_or(row, task.base)),
        indices_(task.indices + row * task.indices_stride) {
    if (!task.as_slots) return;
    pages_ = task.pages.row(task.request(row));
    has_small_tokens_ = base_ >= 0 && base_ + task.columns <= std::int64_t{1} << 31;
  }

  __device__ std::int32_t* indices() const { return indices_; }

  __device__ void write(std::int64_t i, std::int64_t column) const {
    indices_[i] = index(column);
    if (task_.out_scores != nullptr) scores()[i] = score(column);
  }

  // [0, count) by a CTA of kThreads; column(i).
  template <int kThreads, typename Column>
  __device__ void write_all(std::uint32_t count, Column&& column) const {
    if (has_small_tokens_) {
      write_slots<kThreads>(count, column);
    } else {
      for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) indices_[i] = index(column(i));
    }
    if (task_.out_scores == nullptr) return;
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) scores()[i] = score(column(i));
  }

  // Nothing is there.
  __device__ void pad(std::int64_t i) const {
    indices_[i] = static_cast<std::int32_t>(kInvalidSlot);
    if (task_.out_scores != nullptr) scores()[i] = -std::numeric_limits<float>::infinity();
  }

 private:
  __device__ std::int32_t index(std::int64_t column) const {
    const std::int64_t index = base_ + column;
    return narrow_or_invalid(task_.as_slots ? pages_.slot(index) : index);
  }

  // The same for tokens of 31 bits, several of which are looked up together.
  template <int kThreads, typename Column>
  __device__ void write_slots(std::uint32_t count, Column&& column) const {
    constexpr int kTogether = 4;
    const auto width = static_cast<std::uint32_t>(std::min<std::int64_t>(pages_.width, 1u << 31));
    const std::uint32_t page_size = task_.page_size.divisor();
    for (std::uint32_t first = threadIdx.x; first < count; first += kTogether * kThreads) {
      std::uint32_t offsets[kTogether];
      std::int32_t entries[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * kThreads;
        const std::uint32_t token = i < count ? static_cast<std::uint32_t>(base_) + column(i) : 0;
        const std::uint32_t page = task_.page_size.quotient(token);
        offsets[j] = token - page * page_size;
        entries[j] = page < width ? pages_.entries[page] : -1;
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * kThreads;
        const std::uint64_t slot =
            std::uint64_t{static_cast<std::uint32_t>(entries[j])} * page_size + offsets[j];
        const bool is_valid = entries[j] >= 0 && slot >> 31 == 0;
        if (i < count) {
          indices_[i] =
              static_cast<std::int32_t>(is_valid ? static_cast<std::int64_t>(slot) : kInvalidSlot);
        }
      }
    }
  }

  __device__ float* scores() const { return task_.out_scores + row_ * task_.out_scores_stride; }
  __device__ float score(std::int64_t column) const {
    using Bits = typename Score::Bits;
    return Score::to_float(task_.row_scores<Bits>(row_)[column * task_.column_stride]);
  }

  const TopkTask& task_;
  std::int64_t row_;
  std::int64_t base_;
  std::int32_t* indices_;
  PageTableRow pages_;
  bool has_small_tokens_ = false;  // of pages
};

}  // namespace dsa::cuda::topk
