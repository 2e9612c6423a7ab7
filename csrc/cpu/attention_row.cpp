// SPDX-License-Identifier: Apache-2.0
// Attention of one query token over rows of the latent cache; tiles and memory stand in
// attention_row.h.
//
// Scores that are not finite: -inf is a probability of 0, and a row all of them is an empty row
// (out 0, lse +inf, max_logits -inf); NaN and +inf make the head's out and lse NaN.
#include "cpu/attention_row.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "core/fp8.h"
#include "cpu/convert.h"
#include "dsa/kv_layout.h"

namespace dsa::cpu {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kLn2 = 0.693147180559945309417;

constexpr int kHeadStep = 16;  // heads are padded to whole vectors of the widest instruction set
// An odd number of cache lines spreads the rows of a column panel over the sets of L1.
constexpr int kLinePad = 16;
constexpr int kPStride = kTileTokens + kLinePad;

int round_up(int n, int step) { return (n + step - 1) / step * step; }
int padded_stride(int n) { return round_up(n, 2 * kLinePad) + kLinePad; }

// dst[j, i] = src[i, j], i < rows, j < cols; both multiples of 4.
void transpose(const float* src, int src_stride, int rows, int cols, float* dst, int dst_stride) {
  typedef float Quad __attribute__((vector_size(16)));
  for (int i = 0; i < rows; i += 4) {
    for (int j = 0; j < cols; j += 4) {
      Quad r[4];
      for (int x = 0; x < 4; ++x) std::memcpy(&r[x], src + (i + x) * src_stride + j, sizeof(Quad));
      const Quad low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
      const Quad low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
      const Quad high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
      const Quad high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      const Quad t[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                         __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                         __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                         __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (int x = 0; x < 4; ++x) std::memcpy(dst + (j + x) * dst_stride + i, &t[x], sizeof(Quad));
    }
  }
}

// 16-bit values at any address: the byte caches promise no alignment.
void load_rope(const MicroKernels& kernels, const std::uint8_t* src, std::int64_t n, float* dst) {
  std::uint16_t aligned[64];
  std::memcpy(aligned, src, static_cast<std::size_t>(n) * sizeof(*aligned));
  kernels.bf16_to_f32(n, aligned, dst);
}
static_assert(MlaV32Layout::kDimRope == 64 && MlaV4Layout::kDimRope == 64);

}  // namespace

// ---- rows ---------------------------------------------------------------------------------------

LatentRows LatentRows::flat(const TensorView& kv) {
  LatentRows rows;
  rows.format_ = kv.dtype == DType::kFloat16 ? Format::kF16 : Format::kBf16;
  rows.data_ = kv.ptr<const std::uint8_t>();
  rows.num_pages_ = 1;
  rows.page_size_ = kv.size(0);
  rows.token_stride_ = kv.stride(0) * 2;
  rows.dim_ = static_cast<int>(kv.size(-1));
  return rows;
}

LatentRows LatentRows::paged(const TensorView& cache) {
  LatentRows rows;
  rows.data_ = cache.ptr<const std::uint8_t>();
  rows.num_pages_ = cache.size(0);
  rows.page_size_ = cache.size(1);
  const bool half = cache.dtype == DType::kBFloat16 || cache.dtype == DType::kFloat16;
  rows.page_stride_ = cache.stride(0) * (half ? 2 : 1);
  if (half) {
    rows.format_ = cache.dtype == DType::kFloat16 ? Format::kF16 : Format::kBf16;
    rows.token_stride_ = cache.stride(1) * 2;
    rows.dim_ = static_cast<int>(cache.size(-1));
  } else if (cache.size(-1) == MlaV32Layout::kTokenBytes) {
    rows.format_ = Format::kMlaV32;
    rows.token_stride_ = MlaV32Layout::kTokenBytes;
  } else {
    rows.format_ = Format::kMlaV4;
    rows.token_stride_ = MlaV4Layout::kDataBytes;
  }
  return rows;
}

void LatentRows::load(const MicroKernels& kernels, std::int64_t slot, float* dst) const {
  const std::uint8_t* page = data_ + slot / page_size_ * page_stride_;
  const std::int64_t token = slot % page_size_;
  const auto* half = reinterpret_cast<const std::uint16_t*>(page + token * token_stride_);
  switch (format_) {
    case Format::kBf16: return kernels.bf16_to_f32(dim_, half, dst);
    case Format::kF16: return kernels.f16_to_f32(dim_, half, dst);
    case Format::kMlaV32: return load_v32(kernels, page, token, dst);
    case Format::kMlaV4: return load_v4(kernels, page, token, dst);
  }
}

void LatentRows::load_v32(const MicroKernels& kernels, const std::uint8_t* page, std::int64_t token,
                          float* dst) const {
  using Layout = MlaV32Layout;
  float scales[Layout::kNumScales];
  std::memcpy(scales, page + Layout::scales(token), sizeof(scales));
  for (std::int64_t g = 0; g < Layout::kNumScales; ++g) {
    const std::int64_t at = g * Layout::kGroup;
    kernels.e4m3_to_f32(Layout::kGroup, page + Layout::values(token) + at, scales[g], dst + at);
  }
  load_rope(kernels, page + Layout::rope(token), Layout::kDimRope, dst + Layout::kDimNope);
}

void LatentRows::load_v4(const MicroKernels& kernels, const std::uint8_t* page, std::int64_t token,
                         float* dst) const {
  const MlaV4Layout layout{page_size_};
  const std::uint8_t* scales = page + layout.scales(token);
  for (std::int64_t g = 0; g < layout.kNumScales; ++g) {
    const std::int64_t at = g * layout.kGroup;
    kernels.e4m3_to_f32(layout.kGroup, page + layout.values(token) + at, ue8m0_decode(scales[g]),
                        dst + at);
  }
  load_rope(kernels, page + layout.rope(token), layout.kDimRope, dst + layout.kDimNope);
}

void LatentRows::prefetch(std::int64_t slot) const {
  constexpr std::int64_t kLine = 64;
  const std::uint8_t* row =
      data_ + slot / page_size_ * page_stride_ + slot % page_size_ * token_stride_;
  for (std::int64_t at = 0; at < token_stride_; at += kLine) __builtin_prefetch(row + at);
}

int SparseCursor::next(int most, RowRef* refs) {
  int n = 0;
  for (; list_ < 2; ++list_, position_ = 0) {
    const List& list = lists_[list_];
    for (; position_ < list.count && n < most; ++position_) {
      const std::int64_t slot = list.slots[position_];
      if (list.rows->holds(slot)) refs[n++] = {list.rows, slot};
    }
    if (n == most) break;
  }
  return n;
}

int DenseCursor::next(int most, RowRef* refs) {
  int n = 0;
  for (; position_ < count_ && n < most; ++position_) {
    const std::int64_t slot = pages_.slot(position_);
    if (slot != kInvalidSlot) refs[n++] = {rows_, slot};
  }
  return n;
}

// ---- attention ----------------------------------------------------------------------------------

AttentionRow::AttentionRow(int max_heads, int d_qk, int d_v)
    : kernels_(microkernels()),
      d_qk_(d_qk),
      d_v_(d_v),
      q_stride_(padded_stride(max_heads)),
      tile_stride_(padded_stride(d_qk)),
      out_stride_(padded_stride(d_v)),
      q_(std::int64_t{round_up(d_qk, 4)} * q_stride_),
      tile_(std::int64_t{kTileTokens} * tile_stride_),
      scores_(std::int64_t{kTileTokens} * q_stride_),
      p_(std::int64_t{round_up(max_heads, kHeadStep)} * kPStride),
      out_(std::int64_t{max_heads} * out_stride_),
      max_(q_stride_),
      sum_(q_stride_),
      tile_max_(q_stride_) {}

std::int64_t AttentionRow::bytes(int max_heads, int d_qk, int d_v) {
  const std::int64_t heads = padded_stride(max_heads);
  return 4 * (heads * (d_qk + kTileTokens + kPStride + padded_stride(d_v)) +
              std::int64_t{kTileTokens} * padded_stride(d_qk));
}

void AttentionRow::attend(const HeadGroup& group, RowCursor& rows) {
  heads_ = group.heads;
  padded_heads_ = round_up(heads_, kHeadStep);
  std::fill_n(max_.get(), heads_, -kInf);
  std::fill_n(sum_.get(), heads_, 0.0f);
  load_query(group);

  RowRef refs[kTileTokens];
  bool accumulate = false;
  for (int n; (n = rows.next(kTileTokens, refs)) > 0; accumulate = true) {
    load_tile(refs, n);
    score_tile(n, group.scale_log2);
    for (int h = 0; h < heads_; ++h) softmax_tile(h, n);
    kernels_.gemm(heads_, d_v_, n, p_.get(), kPStride, tile_.get(), tile_stride_, out_.get(),
                  out_stride_, accumulate);
  }
  for (int h = 0; h < heads_; ++h) finish_head(group, h);
}

// q^T, converted. The tile buffer, free yet, holds the heads as rows, a step of them at a time.
void AttentionRow::load_query(const HeadGroup& group) {
  float* rows = tile_.get();
  const auto convert = group.dtype == DType::kBFloat16 ? kernels_.bf16_to_f32 : kernels_.f16_to_f32;
  for (int first = 0; first < padded_heads_; first += kHeadStep) {
    for (int i = 0; i < kHeadStep; ++i) {
      const int h = first + i;
      if (h < heads_) {
        convert(d_qk_, group.q + h * group.q_stride, rows + i * tile_stride_);
      } else {
        std::fill_n(rows + i * tile_stride_, d_qk_, 0.0f);
      }
    }
    transpose(rows, tile_stride_, kHeadStep, d_qk_, q_.get() + first, q_stride_);
  }
}

void AttentionRow::load_tile(const RowRef* refs, int n) {
  constexpr int kAhead = 4;  // rows are scattered: no hardware prefetcher foresees the next one
  for (int i = 0; i < std::min(n, kAhead); ++i) refs[i].rows->prefetch(refs[i].slot);
  for (int i = 0; i < n; ++i) {
    if (i + kAhead < n) refs[i + kAhead].rows->prefetch(refs[i + kAhead].slot);
    refs[i].rows->load(kernels_, refs[i].slot, tile_.get() + i * tile_stride_);
  }
}

// p = the tile's scaled scores [heads, n], and the largest of each head, NaN aside.
void AttentionRow::score_tile(int n, float scale_log2) {
  kernels_.gemm(n, padded_heads_, d_qk_, tile_.get(), tile_stride_, q_.get(), q_stride_,
                scores_.get(), q_stride_, false);
  float* __restrict__ largest = tile_max_.get();
  std::fill_n(largest, padded_heads_, -kInf);
  for (int t = 0; t < n; ++t) {
    float* __restrict__ row = scores_.get() + t * q_stride_;
    for (int h = 0; h < padded_heads_; ++h) {
      row[h] *= scale_log2;
      largest[h] = row[h] > largest[h] ? row[h] : largest[h];
    }
  }
  // Rounding n up reads and writes stale scores, which nobody looks at.
  transpose(scores_.get(), q_stride_, round_up(n, 4), padded_heads_, p_.get(), kPStride);
}

// p[head] = 2^(score - maximum), and the head's running maximum, sum and output brought up to it.
void AttentionRow::softmax_tile(int head, int n) {
  float* p = p_.get() + head * kPStride;
  float& sum = sum_.get()[head];
  const float old_max = max_.get()[head];
  const float new_max = std::max(old_max, tile_max_.get()[head]);
  max_.get()[head] = new_max;

  if (std::isinf(new_max)) {
    // -inf: nothing but -inf and NaN so far. +inf: the head is lost.
    for (int t = 0; t < n; ++t) {
      p[t] = new_max < 0.0f && !std::isnan(p[t]) ? 0.0f : kNaN;
      sum += p[t];
    }
    return;
  }
  if (new_max != old_max &&
      old_max != -kInf) {  // before the first score there is nothing to rescale
    const float factor = std::exp2(old_max - new_max);
    sum *= factor;
    kernels_.scale(d_v_, factor, out_.get() + head * out_stride_);
  }
  sum += kernels_.exp2_minus_max(n, new_max, p);
}

// The output times the sink's share, and the statistics. max_ is in base-2 units.
void AttentionRow::finish_head(const HeadGroup& group, int head) {
  const float sum = sum_.get()[head];
  const float max2 = max_.get()[head];
  const bool empty = max2 == -kInf && sum == 0.0f;
  const bool nan = std::isnan(sum);

  double lse = kInf;
  if (!empty) lse = nan ? kNaN : (max2 + std::log2(static_cast<double>(sum))) * kLn2;
  group.lse[head * group.lse_stride] = static_cast<float>(lse);
  if (group.max_logits != nullptr) {
    const double largest = nan && max2 != kInf ? kNaN : max2 * kLn2;
    group.max_logits[head * group.max_logits_stride] = static_cast<float>(largest);
  }

  std::uint16_t* dst = group.out + head * group.out_stride;
  if (empty) {
    std::fill_n(dst, d_v_, std::uint16_t{0});
    return;
  }
  double share = 1.0;
  if (group.sink != nullptr) {
    share = 1.0 / (1.0 + std::exp(group.sink[head * group.sink_stride] - lse));
  }
  float* out = out_.get() + head * out_stride_;
  kernels_.scale(d_v_, static_cast<float>(share / sum), out);
  store_from_float(out, d_v_, group.dtype, dst);
}

int heads_per_group(int num_heads, std::int64_t tokens) {
  const std::int64_t threads = hardware_threads();
  // Each group dequantises the tile again: no finer than the threads need.
  const std::int64_t wanted = (threads + tokens - 1) / std::max<std::int64_t>(tokens, 1);
  const std::int64_t steps = (num_heads + kHeadStep - 1) / kHeadStep;
  const std::int64_t steps_per_group = (steps + wanted - 1) / std::max<std::int64_t>(wanted, 1);
  return static_cast<int>(std::max<std::int64_t>(steps_per_group, 1)) * kHeadStep;
}

}  // namespace dsa::cpu
