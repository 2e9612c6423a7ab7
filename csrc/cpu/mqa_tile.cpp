// SPDX-License-Identifier: Apache-2.0
// The indexer's tile engine; tiles and memory stand in mqa_tile.h.
#include "cpu/mqa_tile.h"

#include <cstring>
#include <limits>

namespace dsa::cpu {

namespace {

constexpr int kBytes = 16;  // a block of the byte transposition is kBytes x kBytes
static_assert(kTileKeys % kBytes == 0 && kMaxHeadDim % kBytes == 0);
typedef std::uint8_t Bytes __attribute__((vector_size(kBytes)));

Bytes zip_low(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
Bytes zip_high(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}

// rows[i][j] <-> rows[j][i]. Each of the four steps rotates the eight bits of an element's index
// (row, column) by one; four of them exchange the row and the column.
void transpose(Bytes (&rows)[kBytes]) {
  for (int step = 0; step < 4; ++step) {
    Bytes next[kBytes];
    for (int i = 0; i < kBytes / 2; ++i) {
      next[2 * i] = zip_low(rows[i], rows[i + kBytes / 2]);
      next[2 * i + 1] = zip_high(rows[i], rows[i + kBytes / 2]);
    }
    std::memcpy(rows, next, sizeof(rows));
  }
}

// dst[d, j] = keys[j].values[d] for kBytes keys; a missing key gives zeros.
void transpose_keys(const KeyRef* keys, int n, int head_dim, std::uint8_t* dst) {
  for (int d = 0; d < head_dim; d += kBytes) {
    Bytes rows[kBytes] = {};
    for (int j = 0; j < n; ++j) {
      if (keys[j].values != nullptr) std::memcpy(&rows[j], keys[j].values + d, kBytes);
    }
    transpose(rows);
    for (int i = 0; i < kBytes; ++i) std::memcpy(dst + (d + i) * kTileKeys, &rows[i], kBytes);
  }
}

}  // namespace

void MqaProblem::set_queries(const TensorView& q, const TensorView& weights) {
  num_heads = static_cast<int>(q.size(-2));
  head_dim = static_cast<int>(q.size(-1));
  q_ = q.ptr<const std::uint8_t>();
  q_strides_[0] = q.ndim == 4 ? q.stride(0) : 0;
  q_strides_[1] = q.stride(-3);
  q_strides_[2] = q.stride(-2);
  weights_ = weights.ptr<const float>();
  weights_stride_ = weights.stride(0);
}

void FlatProblem::locate(std::int64_t, std::int64_t first, int n, KeyRef* keys) const {
  for (int j = 0; j < n; ++j) {
    const std::int64_t key = first + j;
    keys[j] = {k_.ptr<const std::uint8_t>() + key * k_.stride(0),
               k_scale_.ptr<const float>()[key * k_scale_.stride(0)]};
  }
}

Window FlatProblem::window(std::int64_t row) const {
  const std::int64_t start = k_start_.ptr<const std::int32_t>()[row * k_start_.stride(0)];
  const std::int64_t end = k_end_.ptr<const std::int32_t>()[row * k_end_.stride(0)];
  Window w = {std::max<std::int64_t>(start, 0), std::min(end, num_keys)};
  if (w.size() > max_window_) w.end = w.begin + max_window_;
  return w;
}

void PagedProblem::locate(std::int64_t group, std::int64_t first, int n, KeyRef* keys) const {
  const PageTableRow table = table_.row(group);
  std::int64_t logical_page = first / layout_.page_size;
  std::int64_t offset = first % layout_.page_size;
  for (int j = 0; j < n; ++logical_page, offset = 0) {
    const std::int64_t page = table.page(logical_page);
    for (; j < n && offset < layout_.page_size; ++j, ++offset) {
      keys[j] = {nullptr, 0.0f};
      if (page < 0) continue;
      const auto* base = kv_cache_.ptr<const std::uint8_t>() + page * kv_cache_.stride(0);
      keys[j].values = base + layout_.values(offset);
      std::memcpy(&keys[j].scale, base + layout_.scale(offset), sizeof(float));
    }
  }
}

Window PagedProblem::window(std::int64_t row) const {
  const std::int64_t request = row / rows_per_group;
  const std::int64_t lane = row % rows_per_group;
  const auto* lens = context_lens_.ptr<const std::int32_t>() + request * context_lens_.stride(0);
  const std::int64_t length = context_lens_.ndim == 2 ? lens[lane * context_lens_.stride(1)]
                                                      : *lens - rows_per_group + 1 + lane;
  return {0, std::clamp<std::int64_t>(length, 0, num_keys)};
}

MqaTile::MqaTile(const MqaProblem& problem, int block_rows)
    : problem_(problem),
      kernels_(microkernels()),
      queries_(std::int64_t{block_rows} * problem.num_heads * problem.head_dim),
      keys_(std::int64_t{problem.head_dim} * kTileStride) {}

std::int64_t MqaTile::bytes(const MqaProblem& problem, int block_rows) {
  const std::int64_t queries = std::int64_t{block_rows} * problem.num_heads;
  return (queries + kTileStride) * problem.head_dim * 4;
}

void MqaTile::load_queries(const QueryBlock& block) {
  first_row_ = block.first_row;
  float* dst = queries_.get();
  for (int r = 0; r < block.rows; ++r) {
    for (int h = 0; h < problem_.num_heads; ++h, dst += problem_.head_dim) {
      kernels_.e4m3_to_f32(problem_.head_dim, problem_.query(first_row_ + r, h), 1.0f, dst);
    }
  }
}

void MqaTile::load_keys(std::int64_t group, std::int64_t first, int n) {
  KeyRef keys[kTileKeys];
  problem_.locate(group, first, n, keys);
  for (int j = 0; j < n; ++j) {
    scales_[j] = keys[j].scale;
    readable_[j] = keys[j].values != nullptr;
  }
  alignas(kBytes) std::uint8_t codes[kMaxHeadDim * kTileKeys];
  for (int j = 0; j < n; j += kBytes) {
    transpose_keys(keys + j, std::min(n - j, kBytes), problem_.head_dim, codes + j);
  }
  const int filled = (n + kBytes - 1) / kBytes * kBytes;
  for (int d = 0; d < problem_.head_dim; ++d) {
    kernels_.e4m3_to_f32(filled, codes + d * kTileKeys, 1.0f, keys_.get() + d * kTileStride);
  }
}

void MqaTile::score(int row_in_block, int first, int n, float* scores) const {
  const std::int64_t row_size = std::int64_t{problem_.num_heads} * problem_.head_dim;
  const int whole = (n + kBytes - 1) / kBytes * kBytes;  // spares the kernel a partial panel
  kernels_.relu_weighted_sum(problem_.num_heads, whole, problem_.head_dim,
                             queries_.get() + row_in_block * row_size, problem_.head_dim,
                             keys_.get() + first, kTileStride,
                             problem_.row_weights(first_row_ + row_in_block), scores);
  for (int j = 0; j < n; ++j) {
    scores[j] = readable_[first + j] ? scores[j] * scales_[first + j]
                                     : -std::numeric_limits<float>::infinity();
  }
}

QueryBlock BlockGrid::block(std::int64_t index) const {
  const std::int64_t per_group = blocks_per_group();
  const std::int64_t first = index % per_group * rows;
  QueryBlock block;
  block.group = index / per_group;
  block.first_row = block.group * problem.rows_per_group + first;
  block.rows = static_cast<int>(std::min<std::int64_t>(rows, problem.rows_per_group - first));
  for (int r = 0; r < block.rows; ++r) {
    const Window w = problem.window(block.first_row + r);
    block.windows[r] = w;
    if (w.size() == 0) continue;
    block.all = block.all.size() == 0
                    ? w
                    : Window{std::min(block.all.begin, w.begin), std::max(block.all.end, w.end)};
  }
  return block;
}

int choose_block_rows(const MqaProblem& problem, std::int64_t bytes_per_row) {
  constexpr std::int64_t kBlockBytes = 768 << 10;
  const std::int64_t row_bytes =
      std::int64_t{problem.num_heads} * problem.head_dim * 4 + bytes_per_row;
  const std::int64_t most = std::min<std::int64_t>(problem.rows_per_group, kBlockRows);
  return static_cast<int>(
      std::clamp<std::int64_t>(kBlockBytes / row_bytes, 1, std::max<std::int64_t>(most, 1)));
}

}  // namespace dsa::cpu
