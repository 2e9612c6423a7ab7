// SPDX-License-Identifier: Apache-2.0
// A row of topk_select: its window, and how selected columns become indices or slots, and scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/page_table.h"
#include "cuda/common/fast_divisor.h"
#include "cuda/ptx/ldst.cuh"
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

// An optional i32 [B, P] with contiguous rows. A PageTable of a few words: launches with 256 bytes
// of arguments or more take up to 0.9 us longer.
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
  FastDivisor31 pieces;  // of a window, each selected from as if it was a row

  std::int32_t* indices;
  std::int64_t indices_stride;
  float* out_scores;
  std::int64_t out_scores_stride;
  RowInts bases;
  std::int32_t base;
  bool as_slots;
  FastDivisor31 page_size;         // with as_slots
  std::uint32_t last_entry;        // of the page table that has slots of 31 bits
  FastDivisor31 rows_per_request;  // with as_slots, and without requests
  std::int64_t rows_each;          // the same number
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
        page_size(std::min(p.page_size, std::int64_t{1} << 31)),
        last_entry(((1u << 31) - 1) / page_size.divisor()),
        requests(p.row_to_request),
        pages(p.block_table, p.page_size),
        rows(p.scores.size(0)) {
    rows_each = pages.requests > 0 ? rows / pages.requests : 0;
    // Of 31 bits, which is more than all rows that it is asked about.
    rows_per_request = FastDivisor31(std::min(rows_each, std::int64_t{1} << 31));
  }

  __device__ bool has_pieces() const { return pieces.divisor() > 1; }
  // The row of scores that `row`, a row or a piece of one, is of.
  __device__ std::int64_t source_row(std::int64_t row) const {
    return has_pieces() ? pieces.quotient(static_cast<std::uint32_t>(row)) : row;
  }

  template <typename Bits>
  __device__ const Bits* row_scores(std::int64_t row) const {
    return static_cast<const Bits*>(scores) + row * row_stride;
  }

  // A negative one has no pages.
  __device__ std::int64_t request(std::int64_t row) const {
    if (requests.values != nullptr) return requests.value_or(row, -1);
    return rows_each > 0 ? quotient(row, rows_each) : -1;
  }
  __device__ std::int32_t request_of_31_bits(std::int64_t row) const {
    if (requests.values != nullptr) return requests.value_or(row, -1);
    if (rows_each == 0) return -1;
    return static_cast<std::int32_t>(rows_per_request.quotient(static_cast<std::uint32_t>(row)));
  }
};

struct RowWindow {
  int begin;
  int end;  // at least begin

  __device__ RowWindow(int begin, int end) : begin(begin), end(end) {}
  // Of a row of the scores.
  __device__ RowWindow(const TopkTask& task, std::int64_t row) {
    begin = std::max(task.starts.value_or(row, 0), 0);
    end = std::max(std::min(task.ends.value_or(row, task.columns), task.columns), begin);
  }

  __device__ int size() const { return end - begin; }
};

// Equal pieces of a window, the last of them shorter or empty. None has fewer than k columns but
// the last, so that the k best of each stand one after another in k places a piece.
struct WindowPieces {
  RowWindow window;
  std::uint32_t each;

  __device__ WindowPieces(const RowWindow& window, const FastDivisor31& pieces, std::uint32_t k)
      : window(window) {
    const auto size = static_cast<std::uint32_t>(window.size());
    each = size > 0 ? std::max(pieces.quotient(size - 1) + 1, k) : 1;
  }

  __device__ RowWindow piece(std::uint32_t i) const {
    const auto size = static_cast<std::uint32_t>(window.size());
    const std::uint32_t first = std::min(i * each, size);
    return {window.begin + static_cast<int>(first),
            window.begin + static_cast<int>(std::min(first + each, size))};
  }
  // Of all pieces.
  __device__ std::uint32_t num_selected(std::uint32_t k) const {
    const auto size = static_cast<std::uint32_t>(window.size());
    const std::uint32_t full = size / each;
    return full * k + std::min(size - full * each, k);
  }
};

// What is selected from at a time: a row, or a piece of one.
__device__ inline RowWindow window_of(const TopkTask& task, std::int64_t row) {
  if (!task.has_pieces()) return {task, row};
  const std::int64_t source = task.source_row(row);
  return WindowPieces(RowWindow(task, source), task.pieces, task.k)
      .piece(static_cast<std::uint32_t>(row - source * task.pieces.divisor()));
}

// An element of a row's output at a time.
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

  __device__ std::int32_t index(std::int64_t column) const {
    const std::int64_t index = base_ + column;
    return narrow_or_invalid(task_.as_slots ? pages_.slot(index) : index);
  }

 private:
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

// ---- by a CTA -----------------------------------------------------------------------------------
// What not every call asks for is a call of its own, out of the way of a kernel's first run, and
// has by value what it works on: reads of the task through a reference are slow.

// Columns in shared memory, each kStride words after the one before.
template <int kStride>
struct SharedColumns {
  std::uint32_t address;

  __device__ std::uint32_t operator[](int i) const {
    return static_cast<const std::uint32_t*>(__cvta_shared_to_generic(address))[i * kStride];
  }
};

// Columns one after another.
struct ColumnRange {
  std::uint32_t first;

  __device__ std::uint32_t operator[](int i) const { return first + i; }
};

// put(i, look_up(columns[i])). A thread has several looked up together.
template <int kThreads, typename Columns, typename LookUp, typename Put>
__device__ void for_each_column(int count, Columns columns, LookUp&& look_up, Put&& put) {
  constexpr int kTogether = 4;
  int i = threadIdx.x;  // signed, so that the four have one address
  for (; i + (kTogether - 1) * kThreads < count; i += kTogether * kThreads) {
    decltype(look_up(0u)) found[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) found[j] = look_up(columns[i + j * kThreads]);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) put(i + j * kThreads, found[j]);
  }
  if (i >= count) return;
  decltype(look_up(0u)) found[kTogether - 1];
#pragma unroll
  for (int j = 0; j < kTogether - 1; ++j) {
    found[j] = look_up(columns[i + j * kThreads < count ? i + j * kThreads : i]);
  }
#pragma unroll
  for (int j = 0; j < kTogether - 1; ++j) {
    if (i + j * kThreads < count) put(i + j * kThreads, found[j]);
  }
}

// A row of a page table for tokens of 31 bits, `base` and a column, and pages of up to 2^30 tokens.
struct SmallTokens {
  const std::int32_t* entries;
  std::uint32_t width;
  std::uint32_t base;
  std::uint32_t last_entry;  // that has slots of 31 bits
  FastDivisor31 page_size;

  __device__ SmallTokens(const TopkTask& task, std::int64_t row, std::int64_t base)
      : base(static_cast<std::uint32_t>(base)),
        last_entry(task.last_entry),
        page_size(task.page_size) {
    const PageTableRow pages = task.pages.row(task.request_of_31_bits(row));
    entries = pages.entries;
    width = static_cast<std::uint32_t>(std::min<std::int64_t>(pages.width, 1u << 31));
  }
  static __device__ bool are(const TopkTask& task, std::int64_t base) {
    return base >= 0 && base + task.columns <= std::int64_t{1} << 31 &&
           task.page_size.divisor() <= 1u << 30;
  }

  struct Place {
    std::uint32_t entry, offset;
  };
  __device__ Place place(std::uint32_t column) const {
    const std::uint32_t token = base + column;
    const std::uint32_t page = page_size.quotient(token);
    return {page < width ? static_cast<std::uint32_t>(__ldg(entries + page)) : ~0u,
            token - page * page_size.divisor()};
  }
  // Past the last entry all are from 2^31 to 2^32 - 1, which are negative.
  __device__ std::int32_t slot(const Place& at) const {
    static_assert(kInvalidSlot == -1);
    const std::uint32_t entry = std::min(at.entry, last_entry + 1);
    return std::max(static_cast<std::int32_t>(entry * page_size.divisor() + at.offset), -1);
  }
};

template <int kThreads, typename Columns>
__device__ __noinline__ void write_slots(std::int32_t* to, std::uint32_t count, Columns columns,
                                         SmallTokens tokens) {
  for_each_column<kThreads>(
      count, columns, [&](std::uint32_t column) { return tokens.place(column); },
      [&](int i, const SmallTokens::Place& at) { to[i] = tokens.slot(at); });
}

template <typename Score, int kThreads, typename Columns>
__device__ __noinline__ void write_any_slots(const TopkTask& task, std::int64_t row,
                                             std::int32_t* to, std::uint32_t count,
                                             Columns columns) {
  const OutputRow<Score> out(task, row);
  for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) to[i] = out.index(columns[i]);
}

template <typename Score, int kThreads, typename Columns>
__device__ __noinline__ void write_scores(float* to, std::uint32_t count, Columns columns,
                                          const typename Score::Bits* scores) {
  for_each_column<kThreads>(
      count, columns, [&](std::uint32_t column) { return __ldg(scores + column); },
      [&](int i, typename Score::Bits bits) { to[i] = Score::to_float(bits); });
}

// Selected columns, which become [first, first + count) of the row's output. Scores are contiguous.
template <typename Score, int kThreads, typename Columns>
__device__ void write_columns(const TopkTask& task, std::int64_t row, std::uint32_t first,
                              std::uint32_t count, Columns columns) {
  const std::int64_t base = task.bases.value_or(row, task.base);
  std::int32_t* const to = task.indices + row * task.indices_stride + first;
  if (!task.as_slots) {
    for_each_column<kThreads>(
        count, columns, [](std::uint32_t column) { return column; },
        [&](int i, std::uint32_t column) { to[i] = narrow_or_invalid(base + column); });
  } else if (SmallTokens::are(task, base)) {
    write_slots<kThreads>(to, count, columns, SmallTokens(task, row, base));
  } else {
    write_any_slots<Score, kThreads>(task, row, to, count, columns);
  }
  if (task.out_scores != nullptr) {
    write_scores<Score, kThreads>(task.out_scores + row * task.out_scores_stride + first, count,
                                  columns,
                                  task.row_scores<typename Score::Bits>(task.source_row(row)));
  }
}

// Into L2, by the first warp of each CTA that has a part of a row: the entries of a page table that
// columns of a window, which is not empty, may need, unless they are many more than k.
__device__ inline void prefetch_pages(const TopkTask& task, std::int64_t row, RowWindow window,
                                      std::uint32_t part, std::uint32_t parts) {
  constexpr std::uint32_t kLine = 128 / sizeof(std::int32_t);
  if (!task.as_slots || threadIdx.x >= 32) return;
  const std::int64_t base = task.bases.value_or(row, task.base);
  if (!SmallTokens::are(task, base)) return;
  const SmallTokens tokens(task, row, base);
  const std::uint32_t first = tokens.page_size.quotient(tokens.base + window.begin);
  const std::uint32_t end =
      std::min(tokens.page_size.quotient(tokens.base + window.end - 1) + 1, tokens.width);
  if (first >= end || (end - first) / kLine > task.k) return;
  for (std::uint32_t page = first + (part * 32 + threadIdx.x) * kLine; page < end + kLine - 1;
       page += parts * 32 * kLine) {
    ptx::prefetch_l2(tokens.entries + std::min(page, end - 1));
  }
}

}  // namespace dsa::cuda::topk
