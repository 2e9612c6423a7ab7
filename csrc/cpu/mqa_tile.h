// SPDX-License-Identifier: Apache-2.0
// The indexer's tile engine, shared by the logits ops and the fused top-k ops.
//
// A problem is a number of groups of query rows; the rows of a group look at the same keys
// (prefill: one group, a flat key tensor; paged: a group a request). A block of up to kBlockRows
// rows meets a tile of kTileKeys keys at a time:
//   keys     e4m3 rows -> bytes transposed in 16 x 16 blocks -> fp32 [D, kTileStride], once for the
//            block;
//   scores   relu_weighted_sum(H, keys, D) a row of the block, times k_scale.
// Only keys between the ends of the block's windows are read; a row is scored over its own window.
// Memory of a worker (H = 64, D = 128): queries 16 x H x D fp32 = 512 KiB, tile 72 KiB + bytes 16
// KiB: the tile and the row at work stay in L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/page_table.h"
#include "cpu/simd/microkernels.h"
#include "cpu/workers.h"
#include "dsa/kv_layout.h"
#include "dsa/params.h"

namespace dsa::cpu {

inline constexpr int kTileKeys = 128;
// The padding spreads the rows of a column panel over the sets of L1, and lets the last panel of a
// row's keys be read in full vectors.
inline constexpr int kTileStride = kTileKeys + 16;
inline constexpr int kBlockRows = 16;
inline constexpr int kMaxHeadDim = 128;

// Half-open range of keys.
struct Window {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return std::max<std::int64_t>(end - begin, 0); }
};

inline Window intersect(Window a, Window b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

struct KeyRef {
  const std::uint8_t* values;  // e4m3 [D]; nullptr: the key is in no valid page
  float scale;
};

class MqaProblem {
 public:
  // Where the keys [first, first + n) of a group stand.
  virtual void locate(std::int64_t group, std::int64_t first, int n, KeyRef* keys) const = 0;
  // The keys that a row sees, inside [0, num_keys); rows are numbered through all groups.
  virtual Window window(std::int64_t row) const = 0;

  const std::uint8_t* query(std::int64_t row, std::int64_t head) const {
    return q_ + row / rows_per_group * q_strides_[0] + row % rows_per_group * q_strides_[1] +
           head * q_strides_[2];
  }
  const float* row_weights(std::int64_t row) const { return weights_ + row * weights_stride_; }

  std::int64_t num_groups = 0;
  std::int64_t rows_per_group = 0;
  std::int64_t num_keys = 0;
  int num_heads = 0;
  int head_dim = 0;

 protected:
  ~MqaProblem() = default;
  void set_queries(const TensorView& q, const TensorView& weights);

 private:
  const std::uint8_t* q_ = nullptr;
  std::int64_t q_strides_[3] = {};  // group, row, head
  const float* weights_ = nullptr;
  std::int64_t weights_stride_ = 0;
};

class FlatProblem final : public MqaProblem {
 public:
  // Params: MqaLogitsParams or MqaTopkParams. A window is cut after max_window keys.
  template <typename Params>
  FlatProblem(const Params& p, std::int64_t max_window)
      : k_(p.k),
        k_scale_(p.k_scale),
        k_start_(p.k_start),
        k_end_(p.k_end),
        max_window_(max_window) {
    num_groups = 1;
    rows_per_group = p.q.size(0);
    num_keys = p.k.size(0);
    set_queries(p.q, p.weights);
  }

  void locate(std::int64_t group, std::int64_t first, int n, KeyRef* keys) const override;
  Window window(std::int64_t row) const override;

 private:
  TensorView k_, k_scale_, k_start_, k_end_;
  std::int64_t max_window_;
};

class PagedProblem final : public MqaProblem {
 public:
  // Params: PagedMqaLogitsParams or PagedMqaTopkParams.
  template <typename Params>
  explicit PagedProblem(const Params& p)
      : kv_cache_(p.kv_cache),
        context_lens_(p.context_lens),
        table_{p.block_table, p.kv_cache.size(1), p.kv_cache.size(0)},
        layout_{p.q.size(3), p.kv_cache.size(1)} {
    num_groups = p.q.size(0);
    rows_per_group = p.q.size(1);
    num_keys = std::min(p.max_context_len, p.block_table.size(1) * p.kv_cache.size(1));
    set_queries(p.q, p.weights);
  }

  void locate(std::int64_t group, std::int64_t first, int n, KeyRef* keys) const override;
  Window window(std::int64_t row) const override;
  PageTableRow pages(std::int64_t row) const { return table_.row(row / rows_per_group); }

 private:
  TensorView kv_cache_, context_lens_;
  PageTable table_;
  IndexerLayout layout_;
};

// Up to kBlockRows rows of one group, converted to fp32.
struct QueryBlock {
  std::int64_t group = 0;
  std::int64_t first_row = 0;
  int rows = 0;
  Window windows[kBlockRows];
  Window all;  // what the windows span
};

// What a worker holds: the queries of its block and the tile of keys at work.
class MqaTile {
 public:
  explicit MqaTile(const MqaProblem& problem, int block_rows);
  static std::int64_t bytes(const MqaProblem& problem, int block_rows);

  void load_queries(const QueryBlock& block);
  void load_keys(std::int64_t group, std::int64_t first, int n);
  // The scores of n loaded keys, from the key `first` of the tile, for a row of the block. `scores`
  // has room for n rounded up to a multiple of 16.
  void score(int row_in_block, int first, int n, float* scores) const;

 private:
  const MqaProblem& problem_;
  const MicroKernels& kernels_;
  FloatBuffer queries_;  // [block_rows, H, D]
  FloatBuffer keys_;     // [D, kTileStride]
  float scales_[kTileKeys];
  bool readable_[kTileKeys];
  std::int64_t first_row_ = 0;
};

// Blocks of query rows: each group is cut into blocks of `rows` rows.
struct BlockGrid {
  const MqaProblem& problem;
  int rows;

  std::int64_t blocks_per_group() const { return (problem.rows_per_group + rows - 1) / rows; }
  std::int64_t num_blocks() const { return problem.num_groups * blocks_per_group(); }
  QueryBlock block(std::int64_t index) const;
};

// Rows a block, so that its queries and `bytes_per_row` more a row stay in L2.
int choose_block_rows(const MqaProblem& problem, std::int64_t bytes_per_row);

// Calls emit(row_in_block, first_key, n, scores) for all keys of the rows' windows inside `range`,
// in ascending tiles. The block's queries are loaded.
template <typename Emit>
void score_keys(const QueryBlock& block, Window range, MqaTile& tile, Emit&& emit) {
  float scores[kTileKeys];
  range = intersect(range, block.all);
  for (std::int64_t first = range.begin; first < range.end; first += kTileKeys) {
    const Window keys = {first, std::min(first + kTileKeys, range.end)};
    tile.load_keys(block.group, first, static_cast<int>(keys.size()));
    for (int r = 0; r < block.rows; ++r) {
      const Window seen = intersect(keys, block.windows[r]);
      if (seen.size() == 0) continue;
      const int n = static_cast<int>(seen.size());
      tile.score(r, static_cast<int>(seen.begin - first), n, scores);
      emit(r, seen.begin, n, static_cast<const float*>(scores));
    }
  }
}

// Multiplications and additions of a row over `keys` keys.
inline double score_flops(const MqaProblem& problem, std::int64_t keys) {
  return 2.0 * problem.num_heads * problem.head_dim * static_cast<double>(keys);
}

}  // namespace dsa::cpu
