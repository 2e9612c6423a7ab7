// SPDX-License-Identifier: Apache-2.0
// Indexer logits, flat and paged. A work item is a block of query rows by kSpanKeys keys
// (mqa_tile.h); it writes the logits of those keys and, when asked, -inf over the same span of
// columns outside the windows.
// Memory: the output and a tile a worker.
#include <limits>

#include "cpu/convert.h"
#include "cpu/cpu_kernels.h"
#include "cpu/mqa_tile.h"

namespace dsa::cpu {

namespace {

constexpr std::int64_t kSpanKeys = 8 * kTileKeys;

// The output: column c of a row is key c, or, relative, key c of the row's window.
class LogitsWriter {
 public:
  LogitsWriter(const TensorView& out, bool columns_are_relative)
      : out_(out), columns_are_relative_(columns_are_relative) {}

  std::int64_t columns() const { return out_.size(1); }

  // The columns of a row's window.
  Window window_columns(Window keys) const {
    return columns_are_relative_ ? Window{0, keys.size()} : keys;
  }

  void write(std::int64_t row, std::int64_t column, int n, const float* logits) const {
    void* dst = element(out_.data, out_.dtype, row * out_.stride(0) + column);
    store_from_float(logits, n, out_.dtype, dst);
  }

  void clear(std::int64_t row, Window columns) const {
    if (columns.size() == 0) return;
    const std::int64_t at = row * out_.stride(0) + columns.begin;
    if (out_.dtype == DType::kFloat32) {
      std::fill_n(out_.ptr<float>() + at, columns.size(), -std::numeric_limits<float>::infinity());
    } else {
      constexpr std::uint16_t kMinusInf = 0xFF80;
      std::fill_n(out_.ptr<std::uint16_t>() + at, columns.size(), kMinusInf);
    }
  }

 private:
  const TensorView& out_;
  bool columns_are_relative_;
};

// -inf in those columns of `span` that are no key of the row's window.
void clear_outside(const LogitsWriter& out, std::int64_t row, Window window, Window span) {
  span = intersect(span, {0, out.columns()});
  const Window seen = out.window_columns(window);
  if (seen.size() == 0) return out.clear(row, span);
  out.clear(row, intersect(span, {0, seen.begin}));
  out.clear(row, intersect(span, {seen.end, out.columns()}));
}

void run(const MqaProblem& problem, const LogitsWriter& out, bool clean) {
  const BlockGrid grid{problem, choose_block_rows(problem, 0)};
  // The last span of columns may lie past the keys, or the other way round.
  const std::int64_t extent = std::max(problem.num_keys, out.columns());
  const std::int64_t spans = (extent + kSpanKeys - 1) / kSpanKeys;
  const std::int64_t rows = problem.num_groups * problem.rows_per_group;
  const WorkItems items = {grid.num_blocks() * spans,
                           score_flops(problem, problem.num_keys) * static_cast<double>(rows),
                           MqaTile::bytes(problem, grid.rows)};

  for_each_item(
      items, [&] { return MqaTile(problem, grid.rows); },
      [&](MqaTile& tile, std::int64_t item) {
        const QueryBlock block = grid.block(item / spans);
        const std::int64_t begin = item % spans * kSpanKeys;
        const Window span = {begin, begin + kSpanKeys};
        if (clean) {
          for (int r = 0; r < block.rows; ++r) {
            clear_outside(out, block.first_row + r, block.windows[r], span);
          }
        }
        if (intersect(span, block.all).size() == 0) return;
        tile.load_queries(block);
        score_keys(block, span, tile, [&](int r, std::int64_t key, int n, const float* logits) {
          const Window keys = block.windows[r];
          const std::int64_t column = out.window_columns(keys).begin + key - keys.begin;
          out.write(block.first_row + r, column, n, logits);
        });
      });
}

}  // namespace

Status mqa_logits(const MqaLogitsParams& params) {
  const bool compressed = params.max_seqlen_k > 0;
  const FlatProblem problem(params, compressed ? params.max_seqlen_k : params.k.size(0));
  run(problem, LogitsWriter(params.out, compressed), params.clean_logits);
  return {};
}

Status paged_mqa_logits(const PagedMqaLogitsParams& params) {
  run(PagedProblem(params), LogitsWriter(params.out, false), params.clean_logits);
  return {};
}

}  // namespace dsa::cpu
