// SPDX-License-Identifier: Apache-2.0
// Attention of one query token, for a group of its heads, over rows of the latent cache: the part
// that sparse prefill and cached decoding share.
//
// Valid rows are taken kTileTokens at a time and dequantised into an fp32 tile; an invalid slot
// never gets that far. A tile is K of the scores and, in its first d_v columns, V of the output:
//   scores^T [tokens, heads] = tile [tokens, d_qk] . q^T [d_qk, heads]     gemm
//   online softmax in base 2: p [heads, tokens], running maximum and sum a head
//   out [heads, d_v] += p . tile[:, :d_v]                                   gemm, fp32
// so neither the tile nor V is ever transposed, only the scores (d_qk times smaller).
// Memory of a worker, fp32, 128 heads, d_qk 576, d_v 512: q 324 KiB, tile 148 KiB, scores 36 KiB, p
// 40 KiB, out 264 KiB: about 0.8 MiB, which fits a 1 MiB L2.
#pragma once

#include <cstdint>

#include "core/page_table.h"
#include "cpu/simd/microkernels.h"
#include "cpu/workers.h"
#include "dsa/params.h"

namespace dsa::cpu {

inline constexpr int kTileTokens = 64;
inline constexpr double kLog2E = 1.44269504088896340736;  // softmax scale -> base 2

// The rows of a latent cache, one a slot, in any of its formats.
class LatentRows {
 public:
  LatentRows() = default;
  // A flat tensor bf16 | f16 [s_kv, 1, d_qk].
  static LatentRows flat(const TensorView& kv);
  // A paged cache [pages, page_size, 1, d]: bf16 | f16 (d = d_qk), or bytes (d = 656 | 584).
  static LatentRows paged(const TensorView& cache);

  std::int64_t num_slots() const { return num_pages_ * page_size_; }
  std::int64_t num_pages() const { return num_pages_; }
  std::int64_t page_size() const { return page_size_; }
  bool holds(std::int64_t slot) const { return slot >= 0 && slot < num_slots(); }

  // dst[0 .. d_qk) = the row at a valid slot, dequantised.
  void load(const MicroKernels& kernels, std::int64_t slot, float* dst) const;
  void prefetch(std::int64_t slot) const;

 private:
  enum class Format { kBf16, kF16, kMlaV32, kMlaV4 };
  void load_v32(const MicroKernels& kernels, const std::uint8_t* page, std::int64_t token,
                float* dst) const;
  void load_v4(const MicroKernels& kernels, const std::uint8_t* page, std::int64_t token,
               float* dst) const;

  Format format_ = Format::kBf16;
  const std::uint8_t* data_ = nullptr;
  std::int64_t num_pages_ = 0;
  std::int64_t page_size_ = 1;
  std::int64_t page_stride_ = 0;   // bytes
  std::int64_t token_stride_ = 0;  // bytes, inside a page
  int dim_ = 0;                    // d_qk of the 16-bit formats
};

struct RowRef {
  const LatentRows* rows;
  std::int64_t slot;  // valid
};

// The valid rows that a query token attends to, in order.
class RowCursor {
 public:
  // Up to `most` further rows; 0 when there are no more.
  virtual int next(int most, RowRef* refs) = 0;

 protected:
  ~RowCursor() = default;
};

// Lists of slots, some of them invalid, one list a cache.
class SparseCursor final : public RowCursor {
 public:
  struct List {
    const LatentRows* rows = nullptr;
    const std::int32_t* slots = nullptr;
    std::int64_t count = 0;
  };
  explicit SparseCursor(List list) : lists_{list, {}} {}
  SparseCursor(List first, List second) : lists_{first, second} {}
  int next(int most, RowRef* refs) override;

 private:
  List lists_[2];
  int list_ = 0;
  std::int64_t position_ = 0;
};

// The first `count` tokens of a request; those in invalid pages are left out.
class DenseCursor final : public RowCursor {
 public:
  DenseCursor(const LatentRows* rows, const PageTableRow& pages, std::int64_t count)
      : rows_(rows), pages_(pages), count_(count) {}
  int next(int most, RowRef* refs) override;

 private:
  const LatentRows* rows_;
  PageTableRow pages_;
  std::int64_t count_;
  std::int64_t position_ = 0;
};

// Heads of one query token; strides count elements from head to head.
struct HeadGroup {
  DType dtype = DType::kBFloat16;  // of q and out
  int heads = 0;
  int d_qk = 0;
  int d_v = 0;
  float scale_log2 = 0.0f;  // softmax scale * log2(e)
  const std::uint16_t* q = nullptr;
  std::int64_t q_stride = 0;
  const float* sink = nullptr;  // optional
  std::int64_t sink_stride = 0;
  std::uint16_t* out = nullptr;
  std::int64_t out_stride = 0;
  float* lse = nullptr;
  std::int64_t lse_stride = 0;
  float* max_logits = nullptr;  // optional
  std::int64_t max_logits_stride = 0;
};

class AttentionRow {
 public:
  // For up to `max_heads` heads.
  AttentionRow(int max_heads, int d_qk, int d_v);
  static std::int64_t bytes(int max_heads, int d_qk, int d_v);

  void attend(const HeadGroup& group, RowCursor& rows);

 private:
  void load_query(const HeadGroup& group);
  void load_tile(const RowRef* refs, int n);
  void score_tile(int n, float scale_log2);
  void softmax_tile(int head, int n);
  void finish_head(const HeadGroup& group, int head);

  const MicroKernels& kernels_;
  int d_qk_, d_v_;
  int heads_ = 0;         // of the group at work
  int padded_heads_ = 0;  // heads_ rounded up to whole vectors: zeros in q, ignored in the scores
  int q_stride_, tile_stride_, out_stride_;
  FloatBuffer q_;       // [d_qk, q_stride]: transposed
  FloatBuffer tile_;    // [kTileTokens, tile_stride]
  FloatBuffer scores_;  // [kTileTokens, q_stride]
  FloatBuffer p_;       // [heads, kPStride]
  FloatBuffer out_;     // [heads, out_stride]
  FloatBuffer max_;     // [heads], base-2 units
  FloatBuffer sum_;     // [heads]
  FloatBuffer tile_max_;
};

// Heads a work item, of `tokens` query tokens: a small batch still has to feed every thread.
int heads_per_group(int num_heads, std::int64_t tokens);

}  // namespace dsa::cpu
