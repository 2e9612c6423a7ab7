// SPDX-License-Identifier: Apache-2.0
#include "dispatch/validate.h"

#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "dispatch/check.h"
#include "dsa/kv_layout.h"

namespace dsa {

namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kF16 = DType::kFloat16;
constexpr DType kE4M3 = DType::kFloat8E4M3;
constexpr DType kU8 = DType::kUInt8;
constexpr DType kI8 = DType::kInt8;
constexpr DType kI32 = DType::kInt32;
constexpr DType kI64 = DType::kInt64;
constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

// A cache is addressed as [page][byte or element of the page]: a page is one piece of memory.
void contiguous_pages(Check& c, const char* name, const TensorView& cache) {
  if (!c.ok()) return;
  c.that(cache.size(1) >= 1, name, "page_size >= 1", cache.size(1));
  const bool packed = cache.size(1) <= 1 || cache.stride(1) == cache.size(3);
  c.that(packed, name, "tokens of a page back to back (stride(1) equal to the last size)",
         "stride(1) = " + std::to_string(cache.stride(1)));
}

// What is written: two threads must never own the same byte. Each dimension steps over all that
// those of smaller strides span.
void disjoint(Check& c, const char* name, const TensorView& t) {
  if (!c.ok() || t.numel() == 0) return;
  const auto order = [&](int dim) { return std::pair(t.strides[dim], dim); };
  for (int dim = 0; dim < t.ndim; ++dim) {
    std::int64_t span = 1;
    for (int inner = 0; inner < t.ndim; ++inner) {
      if (order(inner) < order(dim)) span += (t.sizes[inner] - 1) * t.strides[inner];
    }
    if (t.sizes[dim] == 1 || t.strides[dim] >= span) continue;
    return c.that(false, name, "elements that do not overlap, to be written", describe_strides(t));
  }
}

void output(Check& c, const char* name, const TensorView& t, DTypes dtypes, Shape shape,
            Layout layout = Layout::kInnerContiguous) {
  c.tensor(name, t, dtypes, shape, layout);
  disjoint(c, name, t);
}

void indexer_cache(Check& c, const TensorView& cache) {
  c.bind("D+4", c.dim("D") + IndexerLayout::kScaleBytes);
  c.tensor("kv_cache", cache, {kU8}, {"pages", "page_size", "1", "D+4"});
  contiguous_pages(c, "kv_cache", cache);
  if (!c.ok()) return;
  c.that(cache.size(0) <= 1 || cache.stride(0) % IndexerLayout::kPageStrideAlign == 0, "kv_cache",
         "a page stride that is a multiple of 4 bytes", cache.stride(0));
}

void indexer_head_dim_of_cache(Check& c, const TensorView& cache) {
  if (cache.ndim != 4) {
    return c.tensor("kv_cache", cache, {kU8}, {"pages", "page_size", "1", "D+4"});
  }
  c.bind("D", cache.size(3) - IndexerLayout::kScaleBytes);
}

// 8-bit MLA cache of 656 or 584 nominal bytes a token; `width` names which.
void fp8_mla_cache(Check& c, const char* name, const TensorView& cache, DTypes dtypes,
                   const char* pages, const char* page_size, const char* width) {
  c.tensor(name, cache, dtypes, {pages, page_size, "1", width});
  contiguous_pages(c, name, cache);
  if (!c.ok()) return;
  c.that(cache.size(0) <= 1 || cache.stride(0) % 4 == 0, name,
         "a page stride that is a multiple of 4 bytes", cache.stride(0));
}

void prefill_logits_inputs(Check& c, const TensorView& q, const TensorView& k,
                           const TensorView& k_scale, const TensorView& weights,
                           const TensorView& k_start, const TensorView& k_end) {
  c.tensor("q", q, {kE4M3}, {"S", "H", "D"});
  c.that(c.dim("H") >= 1, "q", "H >= 1", c.dim("H"));
  c.tensor("kv[0]", k, {kE4M3}, {"L", "D"});
  c.tensor("kv[1]", k_scale, {kF32}, {"L"});
  c.tensor("weights", weights, {kF32}, {"S", "H"});
  c.tensor("cu_seq_len_k_start", k_start, {kI32}, {"S"});
  c.tensor("cu_seq_len_k_end", k_end, {kI32}, {"S"});
  c.that(c.dim("L") <= kMaxInt32, "kv[0]", "at most 2147483647 keys", c.dim("L"));
}

void paged_logits_inputs(Check& c, const TensorView& q, const TensorView& kv_cache,
                         const TensorView& weights, const TensorView& context_lens,
                         const TensorView& block_table, const TensorView& schedule_meta,
                         std::int64_t max_context_len) {
  c.tensor("q", q, {kE4M3}, {"B", "next_n", "H", "D"});
  c.that(c.dim("H") >= 1, "q", "H >= 1", c.dim("H"));
  indexer_cache(c, kv_cache);
  c.bind("B*next_n", c.dim("B") * c.dim("next_n"));
  c.tensor("weights", weights, {kF32}, {"B*next_n", "H"});
  c.tensor("context_lens", context_lens, {kI32}, {"B"}, {"B", "next_n"}, Layout::kAnyStrides);
  c.tensor("block_table", block_table, {kI32}, {"B", "P"});
  c.optional("schedule_meta", schedule_meta, DTypes{kI32}, Shape{"num_sms+1", "2"});
  c.that(max_context_len >= 0 && max_context_len <= kMaxInt32, "max_context_len", "0 to 2147483647",
         max_context_len);
}

void topk_outputs(Check& c, const char* name, const TensorView& indices, const TensorView& scores,
                  const char* rows, std::int64_t topk) {
  c.that(topk >= 1 && topk <= kMaxInt32, "k", "1 to 2147483647", topk);
  c.bind("k", topk);
  output(c, name, indices, {kI32}, {rows, "k"});
  if (scores.defined()) output(c, "out scores", scores, {kF32}, {rows, "k"});
}

// Rows map to requests evenly unless row_to_request says otherwise.
void page_table(Check& c, const TensorView& block_table, std::int64_t page_size,
                const TensorView& row_to_request, std::int64_t rows) {
  c.tensor("block_table", block_table, {kI32}, {"B", "P"});
  c.that(page_size >= 1 && page_size <= kMaxInt32, "page_size", "1 to 2147483647", page_size);
  if (row_to_request.defined()) {
    c.bind("R", rows);
    return c.tensor("row_to_request", row_to_request, {kI32}, {"R"});
  }
  if (!c.ok()) return;
  const std::int64_t requests = c.dim("B");
  c.that(rows == 0 || (requests > 0 && rows % requests == 0), "block_table",
         "a number of rows that divides the rows of the input, or row_to_request",
         std::to_string(requests) + " for " + std::to_string(rows) + " rows");
}

// Device memory for kernels that need some; its size is checked once a kernel is chosen.
void workspace(Check& c, const TensorView& t) {
  c.optional("workspace", t, DTypes{kU8}, Shape{"bytes"});
  if (!c.ok() || !t.defined()) return;
  c.that(t.size(0) <= 1 || t.stride(0) == 1, "workspace", "contiguous bytes", describe_strides(t));
  const auto offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data) % 16);
  c.that(offset == 0, "workspace", "a 16-byte aligned tensor (address mod 16 = 0)", offset);
}

void finite(Check& c, const char* name, double scale) {
  const bool holds = std::isfinite(static_cast<float>(scale));  // what kernels compute with
  c.that(holds, name, "a finite number", std::to_string(scale));
}

}  // namespace

Status validate(const MqaLogitsParams& p) {
  Check c(p.kOp, p.launch.device);
  prefill_logits_inputs(c, p.q, p.k, p.k_scale, p.weights, p.k_start, p.k_end);
  c.that(p.max_seqlen_k >= 0 && p.max_seqlen_k <= kMaxInt32, "max_seqlen_k", "0 to 2147483647",
         p.max_seqlen_k);
  c.bind("max_seqlen_k", p.max_seqlen_k);
  output(c, "out", p.out, {kF32, kBF16}, {"S", p.max_seqlen_k > 0 ? "max_seqlen_k" : "L"});
  return c.take();
}

Status validate(const PagedMqaLogitsParams& p) {
  Check c(p.kOp, p.launch.device);
  paged_logits_inputs(c, p.q, p.kv_cache, p.weights, p.context_lens, p.block_table, p.schedule_meta,
                      p.max_context_len);
  c.optional("indices", p.indices, DTypes{kI32}, Shape{"B"});
  c.bind("max_context_len", p.max_context_len);
  output(c, "out", p.out, {kF32, kBF16}, {"B*next_n", "max_context_len"});
  return c.take();
}

Status validate(const PagedMqaLogitsMetadataParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("context_lens", p.context_lens, {kI32}, {"B"}, {"B", "next_n"}, Layout::kAnyStrides);
  c.that(p.block_kv >= 1, "block_kv", ">= 1", p.block_kv);
  c.that(p.num_sms >= 1 && p.num_sms < kMaxInt32, "num_sms", "1 to 2147483646", p.num_sms);
  c.optional("indices", p.indices, DTypes{kI32}, Shape{"B"});
  c.bind("num_sms+1", p.num_sms + 1);
  output(c, "out", p.out, {kI32}, {"num_sms+1", "2"});
  return c.take();
}

Status validate(const MqaTopkParams& p) {
  Check c(p.kOp, p.launch.device);
  prefill_logits_inputs(c, p.q, p.k, p.k_scale, p.weights, p.k_start, p.k_end);
  topk_outputs(c, "out", p.indices, p.scores, "S", p.topk);
  workspace(c, p.workspace);
  return c.take();
}

Status validate(const PagedMqaTopkParams& p) {
  Check c(p.kOp, p.launch.device);
  paged_logits_inputs(c, p.q, p.kv_cache, p.weights, p.context_lens, p.block_table, p.schedule_meta,
                      p.max_context_len);
  topk_outputs(c, "out", p.indices, p.scores, "B*next_n", p.topk);
  workspace(c, p.workspace);
  return c.take();
}

Status validate(const TopkSelectParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("scores", p.scores, {kF32, kBF16, kF16}, {"R", "N"}, Layout::kAnyStrides);
  c.that(c.dim("N") <= kMaxInt32, "scores", "at most 2147483647 columns", c.dim("N"));
  c.optional("row_starts", p.row_starts, DTypes{kI32}, Shape{"R"});
  c.optional("row_ends", p.row_ends, DTypes{kI32}, Shape{"R"});
  c.optional("index_base", p.index_base, DTypes{kI32}, Shape{"R"});
  c.that(p.index_base_scalar >= -kMaxInt32 - 1 && p.index_base_scalar <= kMaxInt32, "index_base",
         "an int of 32 bits", p.index_base_scalar);
  if (p.block_table.defined()) {
    page_table(c, p.block_table, p.page_size, p.row_to_request, c.dim("R"));
  } else {
    c.absent("row_to_request", p.row_to_request, "without block_table");
    c.that(p.page_size == 0, "page_size", "None without block_table", p.page_size);
  }
  topk_outputs(c, "out", p.indices, p.out_scores, "R", p.topk);
  workspace(c, p.workspace);
  return c.take();
}

Status validate(const MapToSlotsParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("indices", p.indices, {kI32}, {"rows", "k"}, {"requests", "s", "k"});
  const std::int64_t rows = p.indices.ndim == 3 ? c.dim("requests") * c.dim("s") : c.dim("rows");
  page_table(c, p.block_table, p.page_size, p.row_to_request, rows);
  if (p.indices.ndim == 3) {
    output(c, "out", p.out, {kI32}, {"requests", "s", "k"});
  } else {
    output(c, "out", p.out, {kI32}, {"rows", "k"});
  }
  return c.take();
}

Status validate(const MergeTopkParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("scores", p.scores, {kF32, kBF16, kF16}, {"R", "N"}, Layout::kAnyStrides);
  c.tensor("indices", p.indices, {kI32}, {"R", "N"}, Layout::kAnyStrides);
  c.that(c.dim("N") <= kMaxInt32, "scores", "at most 2147483647 columns", c.dim("N"));
  topk_outputs(c, "out", p.out_indices, p.out_scores, "R", p.topk);
  return c.take();
}

namespace {

// Of 8-bit MLA caches, by q's dimension.
constexpr DTypes kBytes = {kU8, kI8, kE4M3};  // dsa::is_8_bit
const char* fp8_row_bytes(const Check& c) {
  return c.dim("d_qk") == MlaV32Layout::kDim ? "656" : "584";
}

void sparse_fwd_kv(Check& c, const SparseFwdParams& p) {
  const bool bytes = is_8_bit(p.kv.dtype);
  const bool has_8_bit_rows = p.kv.ndim == 4 && (p.kv.size(3) == MlaV32Layout::kTokenBytes ||
                                                 p.kv.size(3) == MlaV4Layout::kTokenBytes);
  if (!bytes && !has_8_bit_rows) {
    c.tensor("kv", p.kv, {p.q.dtype}, {"s_kv", "1", "d_qk"}, {"pages", "page_size", "1", "d_qk"});
    if (c.ok() && p.kv.ndim == 4) c.that(p.kv.size(1) >= 1, "kv", "page_size >= 1", p.kv.size(1));
    return;
  }
  if (!bytes || p.kv.ndim != 4) {
    return c.tensor("kv", p.kv, kBytes, {"pages", "page_size", "1", fp8_row_bytes(c)});
  }
  const std::int64_t d_qk = c.dim("d_qk");
  c.that(d_qk == MlaV32Layout::kDim || d_qk == MlaV4Layout::kDim, "q",
         "d_qk 576 (656-byte rows) or 512 (584-byte rows) with an 8-bit kv", d_qk);
  fp8_mla_cache(c, "kv", p.kv, kBytes, "pages", "page_size", fp8_row_bytes(c));
  c.that(p.d_v == 512, "d_v", "512 with an 8-bit kv", p.d_v);
}

}  // namespace

Status validate(const SparseFwdParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("q", p.q, {kBF16, kF16}, {"s_q", "h_q", "d_qk"});
  c.that(c.dim("h_q") >= 1, "q", "h_q >= 1", c.dim("h_q"));
  sparse_fwd_kv(c, p);
  c.tensor("indices", p.indices, {kI32}, {"s_q", "1", "topk"});
  finite(c, "sm_scale", p.sm_scale);
  c.that(p.d_v >= 1 && p.d_v <= c.dim("d_qk"), "d_v", "1 to d_qk", p.d_v);
  c.optional("attn_sink", p.attn_sink, DTypes{kF32}, Shape{"h_q"});
  c.optional("topk_length", p.topk_length, DTypes{kI32}, Shape{"s_q"});
  c.bind("d_v", p.d_v);
  output(c, "out", p.out, {p.q.dtype}, {"s_q", "h_q", "d_v"});
  output(c, "out max_logits", p.max_logits, {kF32}, {"s_q", "h_q"}, Layout::kAnyStrides);
  output(c, "out lse", p.lse, {kF32}, {"s_q", "h_q"}, Layout::kAnyStrides);
  workspace(c, p.workspace);
  return c.take();
}

namespace {

void kvcache_format(Check& c, const KvCacheFwdParams& p) {
  const bool extra = p.extra_k_cache.defined();
  if (!p.is_fp8_kvcache) {
    c.tensor("k_cache", p.k_cache, {p.q.dtype}, {"pages", "page_size", "1", "d_qk"});
    if (c.ok()) c.that(p.k_cache.size(1) >= 1, "k_cache", "page_size >= 1", p.k_cache.size(1));
    if (!extra) return;
    c.tensor("extra_k_cache", p.extra_k_cache, {p.q.dtype},
             {"extra_pages", "extra_page_size", "1", "d_qk"});
    if (c.ok()) {
      c.that(p.extra_k_cache.size(1) >= 1, "extra_k_cache", "page_size >= 1",
             p.extra_k_cache.size(1));
    }
    return;
  }
  const std::int64_t d_qk = c.dim("d_qk");
  c.that(d_qk == MlaV32Layout::kDim || d_qk == MlaV4Layout::kDim, "q",
         "d_qk 576 (656-byte rows) or 512 (584-byte rows) with an FP8 k_cache", d_qk);
  fp8_mla_cache(c, "k_cache", p.k_cache, kBytes, "pages", "page_size", fp8_row_bytes(c));
  if (extra) {
    fp8_mla_cache(c, "extra_k_cache", p.extra_k_cache, kBytes, "extra_pages", "extra_page_size",
                  fp8_row_bytes(c));
  }
  c.that(p.head_dim_v == 512, "head_dim_v", "512 with an FP8 k_cache", p.head_dim_v);
}

void kvcache_sparse(Check& c, const KvCacheFwdParams& p) {
  c.that(!p.causal, "causal", "False with indices", std::string("True"));
  c.tensor("indices", p.indices, {kI32}, {"b", "s_q", "topk"});
  c.optional("topk_length", p.topk_length, DTypes{kI32}, Shape{"b"}, Shape{"b", "s_q"},
             Layout::kAnyStrides);
  if (!p.extra_k_cache.defined()) {
    c.absent("extra_indices_in_kvcache", p.extra_indices, "without extra_k_cache");
    c.absent("extra_topk_length", p.extra_topk_length, "without extra_k_cache");
    return;
  }
  c.tensor("extra_indices_in_kvcache", p.extra_indices, {kI32}, {"b", "s_q", "extra_topk"});
  c.optional("extra_topk_length", p.extra_topk_length, DTypes{kI32}, Shape{"b"}, Shape{"b", "s_q"},
             Layout::kAnyStrides);
}

void kvcache_dense(Check& c, const KvCacheFwdParams& p) {
  const char* when = "in dense mode (indices=None)";
  c.that(p.block_table.defined(), "indices, block_table", "one of them (sparse or dense)",
         std::string("None"));
  c.absent("extra_k_cache", p.extra_k_cache, when);
  c.absent("extra_indices_in_kvcache", p.extra_indices, when);
  c.absent("topk_length", p.topk_length, when);
  c.absent("extra_topk_length", p.extra_topk_length, when);
  c.tensor("block_table", p.block_table, {kI32}, {"b", "P"});
  c.tensor("cache_seqlens", p.cache_seqlens, {kI32}, {"b"});
}

}  // namespace

Status validate(const KvCacheFwdParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("q", p.q, {kBF16, kF16}, {"b", "s_q", "h_q", "d_qk"});
  c.that(c.dim("h_q") >= 1, "q", "h_q >= 1", c.dim("h_q"));
  kvcache_format(c, p);
  finite(c, "softmax_scale", p.softmax_scale);
  c.that(p.head_dim_v >= 1 && p.head_dim_v <= c.dim("d_qk"), "head_dim_v", "1 to d_qk",
         p.head_dim_v);
  p.indices.defined() ? kvcache_sparse(c, p) : kvcache_dense(c, p);
  c.optional("attn_sink", p.attn_sink, DTypes{kF32}, Shape{"h_q"});
  c.bind("d_v", p.head_dim_v);
  output(c, "out", p.out, {p.q.dtype}, {"b", "s_q", "h_q", "d_v"});
  output(c, "out lse", p.lse, {kF32}, {"b", "h_q", "s_q"}, Layout::kAnyStrides);
  workspace(c, p.workspace);
  return c.take();
}

Status validate(const MergeAttnStatesParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("outs", p.outs, {kF32, kBF16, kF16}, {"n", "s", "h", "d"});
  c.tensor("lses", p.lses, {kF32}, {"n", "s", "h"}, Layout::kAnyStrides);
  output(c, "out", p.out, {p.outs.dtype}, {"s", "h", "d"});
  output(c, "out lse", p.lse, {kF32}, {"s", "h"}, Layout::kAnyStrides);
  return c.take();
}

namespace {

// Same leading dimensions; the last one is checked by the caller.
bool same_leading(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i + 1 < a.ndim; ++i) {
    if (a.sizes[i] != b.sizes[i]) return false;
  }
  return true;
}

void inner_contiguous(Check& c, const char* name, const TensorView& t) {
  if (!c.ok() || t.size(-1) <= 1 || t.stride(-1) == 1) return;
  c.that(false, name, "stride 1 in the last dimension", describe_strides(t));
}

// [..., n] of 1 to 8 dimensions.
void rows_of_values(Check& c, const char* name, const TensorView& t, DTypes dtypes) {
  bool known = false;
  for (DType dtype : dtypes) known |= dtype == t.dtype;
  c.that(known && t.ndim >= 1, name, "float32, bfloat16 or float16 [..., n]", describe_tensor(t));
  c.that(t.ndim <= kMaxDims, name, "at most 8 dimensions", t.ndim);
  inner_contiguous(c, name, t);
}

void like_rows(Check& c, const char* name, const TensorView& t, DType dtype, const TensorView& like,
               std::int64_t last, const char* expected) {
  if (!c.ok()) return;
  c.that(t.dtype == dtype && same_leading(t, like) && t.size(-1) == last, name, expected,
         describe_tensor(t));
  c.that(t.device == like.device, name, "a tensor on the device of x", device_name(t.device));
  inner_contiguous(c, name, t);
  disjoint(c, name, t);
}

}  // namespace

Status validate(const HadamardParams& p) {
  Check c(p.kOp, p.launch.device);
  rows_of_values(c, "x", p.x, {kF32, kBF16, kF16});
  if (!c.ok()) return c.take();
  const std::int64_t n = p.x.size(-1);
  c.that(n >= 1 && n <= 32768 && (n & (n - 1)) == 0, "x",
         "a last dimension that is a power of two from 1 to 32768", n);
  finite(c, "scale", p.scale.value_or(1.0));
  like_rows(c, "out", p.out, p.x.dtype, p.x, n, "a tensor like x");
  return c.take();
}

Status validate(const PerTokenCastParams& p) {
  Check c(p.kOp, p.launch.device);
  rows_of_values(c, "x", p.x, {kF32, kBF16, kF16});
  if (!c.ok()) return c.take();
  const std::int64_t n = p.x.size(-1);
  like_rows(c, "out values", p.out, kE4M3, p.x, n, "float8_e4m3fn shaped like x");
  like_rows(c, "out scale", p.scale, kF32, p.x, (n + 127) / 128, "float32 [..., ceil(n / 128)]");
  return c.take();
}

Status validate(const IndexerCacheWriteParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("k", p.k, {kF32, kBF16, kF16}, {"T", "D"});
  c.that(c.dim("D") >= 1 && c.dim("D") <= 128, "k", "a head dimension D from 1 to 128", c.dim("D"));
  indexer_cache(c, p.kv_cache);
  disjoint(c, "kv_cache", p.kv_cache);
  c.tensor("slot_mapping", p.slot_mapping, {kI32, kI64}, {"T"});
  return c.take();
}

Status validate(const IndexerCacheGatherParams& p) {
  Check c(p.kOp, p.launch.device);
  indexer_head_dim_of_cache(c, p.kv_cache);
  indexer_cache(c, p.kv_cache);
  c.that(c.dim("D") >= 1, "kv_cache", "a last dimension of D + 4 bytes, D >= 1",
         c.dim("D") + IndexerLayout::kScaleBytes);
  c.tensor("block_table", p.block_table, {kI32}, {"B", "P"});
  c.bind("B+1", c.dim("B") + 1);
  c.tensor("cu_seqlens", p.cu_seqlens, {kI32}, {"B+1"});
  output(c, "out k", p.k, {kE4M3}, {"num_tokens", "D"});
  output(c, "out k_scale", p.k_scale, {kF32}, {"num_tokens"});
  return c.take();
}

Status validate(const MlaCacheWriteParams& p) {
  Check c(p.kOp, p.launch.device);
  c.tensor("kv_c", p.kv_c, {kBF16, kF16}, {"T", "d_nope"});
  c.tensor("k_pe", p.k_pe, {p.kv_c.dtype}, {"T", "d_rope"});
  const bool has_8_bit_rows = p.kv_cache.dtype != p.kv_c.dtype && p.kv_cache.ndim == 4 &&
                              (p.kv_cache.size(3) == MlaV32Layout::kTokenBytes ||
                               p.kv_cache.size(3) == MlaV4Layout::kTokenBytes);
  if (p.kv_cache.dtype == kU8 || has_8_bit_rows) {
    const std::int64_t d_nope = c.dim("d_nope");
    c.that(d_nope == MlaV32Layout::kDimNope || d_nope == MlaV4Layout::kDimNope, "kv_c",
           "d_nope 512 (656-byte rows) or 448 (584-byte rows) with a uint8 kv_cache", d_nope);
    c.that(c.dim("d_rope") == MlaV32Layout::kDimRope, "k_pe", "d_rope 64 with a uint8 kv_cache",
           c.dim("d_rope"));
    fp8_mla_cache(c, "kv_cache", p.kv_cache, {kU8}, "pages", "page_size",
                  d_nope == MlaV32Layout::kDimNope ? "656" : "584");
  } else {
    c.bind("d_nope+d_rope", c.dim("d_nope") + c.dim("d_rope"));
    c.tensor("kv_cache", p.kv_cache, {p.kv_c.dtype}, {"pages", "page_size", "1", "d_nope+d_rope"});
    if (c.ok()) c.that(p.kv_cache.size(1) >= 1, "kv_cache", "page_size >= 1", p.kv_cache.size(1));
  }
  disjoint(c, "kv_cache", p.kv_cache);
  c.tensor("slot_mapping", p.slot_mapping, {kI32, kI64}, {"T"});
  return c.take();
}

Status validate(const MlaCacheGatherParams& p) {
  Check c(p.kOp, p.launch.device);
  DType out_dtype = p.kv_cache.dtype;
  if (p.kv_cache.dtype == kU8) {
    out_dtype = kBF16;
    const std::int64_t width = p.kv_cache.ndim == 4 ? p.kv_cache.size(3) : 0;
    c.that(width == MlaV32Layout::kTokenBytes || width == MlaV4Layout::kTokenBytes, "kv_cache",
           "656 or 584 bytes a token for a uint8 cache", describe_tensor(p.kv_cache));
    fp8_mla_cache(c, "kv_cache", p.kv_cache, {kU8}, "pages", "page_size",
                  width == MlaV32Layout::kTokenBytes ? "656" : "584");
    c.bind("d", width == MlaV32Layout::kTokenBytes ? MlaV32Layout::kDim : MlaV4Layout::kDim);
  } else {
    c.tensor("kv_cache", p.kv_cache, {kU8, kBF16, kF16}, {"pages", "page_size", "1", "d"});
    if (c.ok()) c.that(p.kv_cache.size(1) >= 1, "kv_cache", "page_size >= 1", p.kv_cache.size(1));
  }
  c.tensor("block_table", p.block_table, {kI32}, {"B", "P"});
  c.bind("B+1", c.dim("B") + 1);
  c.tensor("cu_seqlens", p.cu_seqlens, {kI32}, {"B+1"});
  output(c, "out", p.out, {out_dtype}, {"num_tokens", "d"});
  return c.take();
}

}  // namespace dsa
