// SPDX-License-Identifier: Apache-2.0
// What the attention kernels are called with, prefill and decode alike.
#pragma once

#include <cstdint>

#include "cuda/common/fast_divisor.h"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

enum class LatentFormat { kBf16, kF16, kMlaV32, kMlaV4 };

// Rows of latents, one a slot: page p begins at data + p * page_stride, its token t token_stride
// further for each.
struct LatentRows {
  const std::uint8_t* data = nullptr;
  std::int64_t num_slots = 0;
  std::int64_t num_pages = 0;
  FastDivisor31 page_size;         // slots are int32: a larger page than 2^31 is one page
  std::int64_t page_stride = 0;    // bytes
  std::int64_t token_stride = 0;   // bytes
  std::int64_t scales_offset = 0;  // bytes from a page's begin to its first scales, if FP8
  std::int64_t scales_stride = 0;  // bytes from token to token
  bool aligned = true;             // every row on 16 bytes
};

// Selected slots of one cache: slots[b, j, 0 .. count), of which `length` many count.
struct SlotList {
  LatentRows rows;
  const std::int32_t* slots = nullptr;
  std::int64_t stride_b = 0, stride_j = 0;
  const std::int32_t* length = nullptr;  // optional
  std::int64_t length_stride_b = 0, length_stride_j = 0;
  int count = 0;
};

// Query token r is token j = r % tokens_per_request of request b = r / tokens_per_request.
struct AttentionArgs {
  const std::uint16_t* q = nullptr;  // [b, j, heads, d_qk], strides in elements
  std::int64_t q_stride_b = 0, q_stride_j = 0, q_stride_h = 0;
  bool q_aligned = false;
  std::uint16_t* out = nullptr;  // [b, j, heads, d_v]
  std::int64_t out_stride_b = 0, out_stride_j = 0, out_stride_h = 0;
  bool out_aligned = false;
  float* lse = nullptr;  // [b, j, heads]
  std::int64_t lse_stride_b = 0, lse_stride_j = 0, lse_stride_h = 0;
  float* max_logits = nullptr;  // optional
  std::int64_t max_stride_b = 0, max_stride_j = 0, max_stride_h = 0;
  const float* sink = nullptr;  // [heads], optional
  std::int64_t sink_stride = 0;
  float scale_log2 = 0.0f;  // softmax scale * log2(e)
  int tokens_per_request = 1;
  int num_heads = 0;
  int d_qk = 0, d_v = 0;

  // Sparse: up to two lists, one softmax over both.
  SlotList lists[2];
  // Dense, if block_table is given: the first tokens of the request, in lists[0].rows.
  const std::int32_t* block_table = nullptr;  // [b, table_width]
  std::int64_t table_stride = 0;
  std::int64_t table_width = 0;
  const std::int32_t* seqlens = nullptr;  // [b]
  std::int64_t seqlens_stride = 0;
  bool causal = false;

  // Splits of a row's keys; more than one write partial results for attention_combine, or are
  // combined by the kernel.
  std::int64_t first_row = 0;
  int num_splits = 1;
  int least_split_tokens = 0;    // of a split that is not a row's last
  float* partial_out = nullptr;  // [rows of the launch, splits, heads, d_v], normalised
  float* partial_lse = nullptr;  // [rows of the launch, splits, heads], base 2; -inf: empty
};

}  // namespace dsa::cuda
