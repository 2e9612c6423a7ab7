// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/page_table.h"
#include "cpu/cpu_kernels.h"
#include "cpu/tensor_rows.h"
#include "cpu/topk_row.h"
#include "dsa/parallel.h"

namespace dsa::cpu {
namespace {

class RowSelector {
 public:
  explicit RowSelector(const TopkSelectParams& params)
      : params_(params),
        indices_(params.indices),
        table_{params.block_table, params.page_size},
        request_of_row_{params.row_to_request, params.scores.size(0), params.block_table.size(0)} {}

  void run(std::int64_t row) const {
    const std::int64_t begin = std::max<std::int64_t>(bound(params_.row_starts, row, 0), 0);
    const std::int64_t end = std::min(bound(params_.row_ends, row, num_columns()), num_columns());
    std::int32_t* indices = indices_.row<std::int32_t>(row);

    // An empty window may begin anywhere: no address is formed from it.
    const ScoreRow window = begin < end ? score_row(row).from(begin) : ScoreRow{};
    const std::int64_t count = select_topk(window, end - begin, params_.topk, indices);
    if (params_.out_scores.defined()) write_scores(row, window, indices, count);
    write_indices(row, begin, indices, count);
  }

 private:
  std::int64_t num_columns() const { return params_.scores.size(1); }

  ScoreRow score_row(std::int64_t row) const {
    const TensorView& scores = params_.scores;
    return {element(scores.data, scores.dtype, row * scores.stride(0)), scores.dtype,
            scores.stride(1)};
  }

  static std::int64_t bound(const TensorView& bounds, std::int64_t row, std::int64_t otherwise) {
    return bounds.defined() ? bounds.ptr<const std::int32_t>()[row * bounds.stride(0)] : otherwise;
  }

  void write_scores(std::int64_t row, const ScoreRow& window, const std::int32_t* columns,
                    std::int64_t count) const {
    float* out = params_.out_scores.ptr<float>() + row * params_.out_scores.stride(0);
    for (std::int64_t i = 0; i < count; ++i) out[i] = window.at(columns[i]);
    std::fill(out + count, out + params_.topk, -std::numeric_limits<float>::infinity());
  }

  // Turns columns of the window into what the caller asked for, in place.
  void write_indices(std::int64_t row, std::int64_t window_begin, std::int32_t* indices,
                     std::int64_t count) const {
    const std::int64_t base =
        window_begin + bound(params_.index_base, row, params_.index_base_scalar);
    if (params_.block_table.defined()) {
      const PageTableRow pages = table_.row(request_of_row_(row));
      for (std::int64_t i = 0; i < count; ++i) {
        indices[i] = narrow_or_invalid(pages.slot(base + indices[i]));
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) indices[i] = narrow_or_invalid(base + indices[i]);
    }
    std::fill(indices + count, indices + params_.topk, static_cast<std::int32_t>(kInvalidSlot));
  }

  const TopkSelectParams& params_;
  TensorRows indices_;
  PageTable table_;
  RequestOfRow request_of_row_;
};

}  // namespace

Status topk_select(const TopkSelectParams& params) {
  const RowSelector selector(params);
  parallel_for(0, params.scores.size(0), row_grain(params.scores.size(1) + params.topk),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) selector.run(row);
               });
  return {};
}

}  // namespace dsa::cpu
