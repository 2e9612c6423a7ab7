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

// An optional i32 [B, P] with contiguous rows. A PageTable of a few words: launches with more than
// some 200 bytes of arguments take up to 0.9 us longer.
struct RequestPages {
  const std::int32_t* entries = nullptr;
  std::int64_t stride = 0, requests = 0, width = 0, page_size = 1;

  RequestPages(const TensorView& table, std::int64_t page_size) : page_size(page_size) {
    if (!table.defined()) return;
    entries = table.ptr<const std::int32_t>();
    stride = table.stride(0);
    requests = table.size(0);
    width = table.size(1);
  }

  // Of a request outside [0, B), one that maps nothing.
  __device__ PageTableRow row(std::int64_t request) const {
    if (request < 0 || request >= requests || width == 0) return {};
    return {entries + request * stride, width, page_size};
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
  RequestPages pages;
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
        page_size(std::min(p.page_size, std::int64_t{1} << 31)),  // which holds all small tokens
        requests(p.row_to_request),
        pages(p.block_table, p.page_size),
        rows(p.scores.size(0)) {
    const std::int64_t rows_each = pages.requests > 0 ? rows / pages.requests : 0;
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

  // All columns of a row.
  __device__ explicit RowWindow(const TopkTask& task) : begin(0), end(task.columns) {}
  __device__ RowWindow(const TopkTask& task, std::int64_t row) {
    begin = std::max(task.starts.value_or(row, 0), 0);
    end = std::max(std::min(task.ends.value_or(row, task.columns), task.columns), begin);
  }

  __device__ int size() const { return end - begin; }
};

// Columns in shared memory, each kStride words after the one before.
template <int kStride>
struct SharedColumns {
  const std::uint32_t* first;

  __device__ std::uint32_t operator[](std::uint32_t i) const { return first[i * kStride]; }
};

template <typename Score>
class OutputRow {
 public:
  __device__ OutputRow(const TopkTask& task, std::int64_t row)
      : task_(task),
        row_(row),
        base_(task.bases.value_or(row, task.base)),
        indices_(task.indices + row * task.indices_stride) {
    if (task.as_slots) pages_ = task.pages.row(task.request(row));
  }

  __device__ std::int32_t* indices() const { return indices_; }

  __device__ void write(std::int64_t i, std::int64_t column) const {
    indices_[i] = index(column);
    if (task_.out_scores != nullptr) scores()[i] = score(column);
  }

  // Nothing is there.
  __device__ void pad(std::int64_t i) const {
    indices_[i] = static_cast<std::int32_t>(kInvalidSlot);
    if (task_.out_scores != nullptr) scores()[i] = -std::numeric_limits<float>::infinity();
  }

  // write() of a selection, by a CTA: columns[i] to first + i, up to `count`. What not every call
  // asks for is a call of its own, out of the way of a kernel's first run.
  template <typename Columns>
  static __device__ void write_all(const TopkTask& task, std::int64_t row, std::uint32_t first,
                                   std::uint32_t count, Columns columns) {
    if (task.as_slots) {
      write_slots(task, row, first, count, columns);
    } else {
      const std::int64_t base = task.bases.value_or(row, task.base);
      std::int32_t* const to = task.indices + row * task.indices_stride + first;
      for_each_column(count, columns, [](std::uint32_t column) { return column; },
                      [&](std::uint32_t i, std::uint32_t column) {
                        to[i] = narrow_or_invalid(base + column);
                      });
    }
    if (task.out_scores != nullptr) write_scores(task, row, first, count, columns);
  }

 private:
  __device__ std::int32_t index(std::int64_t column) const {
    const std::int64_t index = base_ + column;
    return narrow_or_invalid(task_.as_slots ? pages_.slot(index) : index);
  }

  template <typename Columns>
  static __device__ __noinline__ void write_slots(const TopkTask& task, std::int64_t row,
                                                  std::uint32_t first, std::uint32_t count,
                                                  Columns columns) {
    const OutputRow out(task, row);
    std::int32_t* const to = out.indices_ + first;
    if (out.base_ >= 0 && out.base_ + task.columns <= std::int64_t{1} << 31) {
      out.write_small_tokens(to, count, columns);
    } else {
      for (std::uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
        to[i] = out.index(columns[i]);
      }
    }
  }

  // Of 31 bits, several of which are looked up together.
  template <typename Columns>
  __device__ void write_small_tokens(std::int32_t* to, std::uint32_t count,
                                     Columns columns) const {
    struct Place {
      std::int32_t entry;
      std::uint32_t offset;
    };
    const auto width = static_cast<std::uint32_t>(std::min<std::int64_t>(pages_.width, 1u << 31));
    const std::uint32_t page_size = task_.page_size.divisor();
    for_each_column(
        count, columns,
        [&](std::uint32_t column) {
          const std::uint32_t token = static_cast<std::uint32_t>(base_) + column;
          const std::uint32_t page = task_.page_size.quotient(token);
          return Place{page < width ? pages_.entries[page] : -1, token - page * page_size};
        },
        [&](std::uint32_t i, const Place& place) {
          const std::uint64_t slot =
              std::uint64_t{static_cast<std::uint32_t>(place.entry)} * page_size + place.offset;
          to[i] = place.entry >= 0 && slot >> 31 == 0 ? static_cast<std::int32_t>(slot) : -1;
        });
  }

  template <typename Columns>
  static __device__ __noinline__ void write_scores(const TopkTask& task, std::int64_t row,
                                                   std::uint32_t first, std::uint32_t count,
                                                   Columns columns) {
    const OutputRow out(task, row);
    float* const to = out.scores() + first;
    for_each_column(
        count, columns, [&](std::uint32_t column) { return out.score(column); },
        [&](std::uint32_t i, float score) { to[i] = score; });
  }

  // put(i, look_up(columns[i])) by a CTA. A thread has several looked up together.
  template <typename Columns, typename LookUp, typename Put>
  static __device__ void for_each_column(std::uint32_t count, Columns columns, LookUp&& look_up,
                                         Put&& put) {
    constexpr int kTogether = 4;
    for (std::uint32_t first = threadIdx.x; first < count; first += kTogether * blockDim.x) {
      decltype(look_up(0u)) found[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * blockDim.x;
        found[j] = look_up(columns[i < count ? i : first]);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const std::uint32_t i = first + j * blockDim.x;
        if (i < count) put(i, found[j]);
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
};

}  // namespace dsa::cuda::topk
