// SPDX-License-Identifier: Apache-2.0
// The arguments of every op: plain data (pointers, sizes, int64 strides), no torch.
//
// A TensorView describes a tensor exactly as the caller holds it; dispatch/validate.cpp checks all
// of them, so a backend may rely on the shapes written behind each member. Strides count elements.
#pragma once

#include <cstdint>
#include <optional>

#include "dsa/host_device.h"

namespace dsa {

enum class DType : std::uint8_t {
  kUndefined,  // an optional tensor that was not given
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3,
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
  // No op takes these: they have a name for messages, kOther has none.
  kFloat64,
  kFloat8E4M3Fnuz,
  kFloat8E5M2,
  kFloat8E8M0,
  kFloat4E2M1,
  kInt16,
  kUInt16,
  kUInt32,
  kUInt64,
  kBool,
  kOther,
};

// What FP8 caches are held in.
DSA_HOST_DEVICE constexpr bool is_8_bit(DType dtype) {
  return dtype == DType::kUInt8 || dtype == DType::kInt8 || dtype == DType::kFloat8E4M3;
}

enum class DeviceType : std::uint8_t { kCpu, kCuda, kOther };

struct Device {
  DeviceType type = DeviceType::kCpu;
  std::int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kUndefined;
  Device device;
  std::int32_t ndim = 0;  // past kMaxDims only the number is right: validate refuses it
  std::int64_t sizes[kMaxDims] = {};
  std::int64_t strides[kMaxDims] = {};

  DSA_HOST_DEVICE bool defined() const { return dtype != DType::kUndefined; }
  DSA_HOST_DEVICE std::int64_t size(int dim) const { return sizes[dim < 0 ? dim + ndim : dim]; }
  DSA_HOST_DEVICE std::int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  DSA_HOST_DEVICE std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= sizes[i];
    return n;
  }
  template <typename T>
  DSA_HOST_DEVICE T* ptr() const {
    return static_cast<T*>(data);
  }
};

// Device memory that lives until the call's kernels have run; nullptr: there is none.
using AllocateFn = void* (*)(std::int64_t bytes, void* context);

// Device of the call and, on CUDA, the stream (a cudaStream_t) that every kernel is launched on.
struct Launch {
  Device device;
  void* stream = nullptr;
  AllocateFn allocate = nullptr;  // for a workspace that the caller did not give; optional
  void* allocate_context = nullptr;
};

// No kernel needs a larger workspace than this, whatever the shape.
inline constexpr std::int64_t kMaxWorkspaceBytes = std::int64_t{64} << 20;

// ---- indexer ------------------------------------------------------------------------------------

struct MqaLogitsParams {
  static constexpr const char* kOp = "fp8_mqa_logits";
  TensorView q;        // e4m3 [S, H, D]
  TensorView k;        // e4m3 [L, D]
  TensorView k_scale;  // f32 [L]
  TensorView weights;  // f32 [S, H]
  TensorView k_start;  // i32 [S]
  TensorView k_end;    // i32 [S]
  bool clean_logits = true;
  std::int64_t max_seqlen_k = 0;
  TensorView out;  // f32 | bf16 [S, L], or [S, max_seqlen_k] when max_seqlen_k > 0
  Launch launch;
};

struct PagedMqaLogitsParams {
  static constexpr const char* kOp = "fp8_paged_mqa_logits";
  TensorView q;              // e4m3 [B, next_n, H, D]
  TensorView kv_cache;       // u8 [pages, page_size, 1, D + 4]
  TensorView weights;        // f32 [B * next_n, H]
  TensorView context_lens;   // i32 [B] or [B, next_n]
  TensorView block_table;    // i32 [B, P]
  TensorView schedule_meta;  // i32 [num_sms + 1, 2], optional: a hint for the GPU, never trusted
  std::int64_t max_context_len = 0;
  bool clean_logits = false;
  TensorView indices;  // i32 [B], optional: checked, of no meaning here
  TensorView out;      // f32 | bf16 [B * next_n, max_context_len]
  Launch launch;
};

struct PagedMqaLogitsMetadataParams {
  static constexpr const char* kOp = "get_paged_mqa_logits_metadata";
  TensorView context_lens;  // i32 [B] or [B, next_n]
  std::int64_t block_kv = 0;
  std::int64_t num_sms = 0;
  TensorView indices;  // i32 [B], optional
  TensorView out;      // i32 [num_sms + 1, 2]
  Launch launch;
};

struct MqaTopkParams {
  static constexpr const char* kOp = "fp8_mqa_topk";
  TensorView q;        // e4m3 [S, H, D]
  TensorView k;        // e4m3 [L, D]
  TensorView k_scale;  // f32 [L]
  TensorView weights;  // f32 [S, H]
  TensorView k_start;  // i32 [S]
  TensorView k_end;    // i32 [S]
  std::int64_t topk = 0;
  TensorView indices;    // i32 [S, topk]
  TensorView scores;     // f32 [S, topk], optional
  TensorView workspace;  // u8 [bytes], optional; see kMaxWorkspaceBytes
  Launch launch;
};

struct PagedMqaTopkParams {
  static constexpr const char* kOp = "fp8_paged_mqa_topk";
  TensorView q;              // e4m3 [B, next_n, H, D]
  TensorView kv_cache;       // u8 [pages, page_size, 1, D + 4]
  TensorView weights;        // f32 [B * next_n, H]
  TensorView context_lens;   // i32 [B] or [B, next_n]
  TensorView block_table;    // i32 [B, P]
  TensorView schedule_meta;  // i32 [num_sms + 1, 2], optional
  std::int64_t max_context_len = 0;
  std::int64_t topk = 0;
  bool return_slots = false;
  TensorView indices;    // i32 [B * next_n, topk]
  TensorView scores;     // f32 [B * next_n, topk], optional
  TensorView workspace;  // u8 [bytes], optional; see kMaxWorkspaceBytes
  Launch launch;
};

// ---- selection ----------------------------------------------------------------------------------

struct TopkSelectParams {
  static constexpr const char* kOp = "topk_select";
  TensorView scores;  // f32 | bf16 | f16 [R, N], any strides
  std::int64_t topk = 0;
  TensorView row_starts;               // i32 [R], optional
  TensorView row_ends;                 // i32 [R], optional
  TensorView index_base;               // i32 [R], optional
  std::int64_t index_base_scalar = 0;  // used when index_base is not given
  TensorView block_table;              // i32 [B, P], optional
  std::int64_t page_size = 0;          // with block_table
  TensorView row_to_request;           // i32 [R], optional
  TensorView indices;                  // i32 [R, topk]
  TensorView out_scores;               // f32 [R, topk], optional
  TensorView workspace;                // u8 [bytes], optional; see kMaxWorkspaceBytes
  Launch launch;
};

struct MapToSlotsParams {
  static constexpr const char* kOp = "map_to_slots";
  TensorView indices;      // i32 [R, k] or [B, s, k]
  TensorView block_table;  // i32 [B, P]
  std::int64_t page_size = 0;
  TensorView row_to_request;  // i32 [R], optional
  TensorView out;             // i32, shaped like indices
  Launch launch;
};

struct MergeTopkParams {
  static constexpr const char* kOp = "merge_topk";
  TensorView scores;   // f32 | bf16 | f16 [R, N]
  TensorView indices;  // i32 [R, N]
  std::int64_t topk = 0;
  TensorView out_indices;  // i32 [R, topk]
  TensorView out_scores;   // f32 [R, topk], optional
  Launch launch;
};

// ---- attention ----------------------------------------------------------------------------------

struct SparseFwdParams {
  static constexpr const char* kOp = "flash_mla_sparse_fwd";
  TensorView q;  // bf16 | f16 [s_q, h_q, d_qk]
  // Like q [s_kv, 1, d_qk], or a paged cache: like q [pages, page_size, 1, d_qk], or 8-bit
  // [pages, page_size, 1, 656 | 584].
  TensorView kv;
  TensorView indices;  // i32 [s_q, 1, topk]: rows of kv, or slots of the cache
  double sm_scale = 0.0;
  std::int64_t d_v = 0;
  TensorView attn_sink;    // f32 [h_q], optional
  TensorView topk_length;  // i32 [s_q], optional
  bool batch_invariant = false;
  TensorView out;         // like q [s_q, h_q, d_v]
  TensorView max_logits;  // f32 [s_q, h_q]
  TensorView lse;         // f32 [s_q, h_q]
  TensorView workspace;   // u8 [bytes], optional; see kMaxWorkspaceBytes
  Launch launch;

  bool is_fp8() const { return kv.dtype != q.dtype; }
};

struct KvCacheFwdParams {
  static constexpr const char* kOp = "flash_mla_with_kvcache";
  TensorView q;  // bf16 | f16 [b, s_q, h_q, d_qk]
  TensorView
      k_cache;  // like q [pages, page_size, 1, d_qk], or 8-bit [pages, page_size, 1, 656 | 584]
  TensorView block_table;    // i32 [b, P]; dense only
  TensorView cache_seqlens;  // i32 [b]; dense only
  std::int64_t head_dim_v = 0;
  double softmax_scale = 0.0;
  bool causal = false;
  bool is_fp8_kvcache = false;
  TensorView indices;            // i32 [b, s_q, topk]; given: sparse
  TensorView attn_sink;          // f32 [h_q], optional
  TensorView extra_k_cache;      // format of k_cache, its own page size; sparse only, optional
  TensorView extra_indices;      // i32 [b, s_q, extra_topk]
  TensorView topk_length;        // i32 [b] or [b, s_q], optional
  TensorView extra_topk_length;  // i32 [b] or [b, s_q], optional
  bool batch_invariant = false;
  TensorView out;        // like q [b, s_q, h_q, head_dim_v]
  TensorView lse;        // f32 [b, h_q, s_q]
  TensorView workspace;  // u8 [bytes], optional; see kMaxWorkspaceBytes
  Launch launch;
};

struct MergeAttnStatesParams {
  static constexpr const char* kOp = "merge_attn_states";
  TensorView outs;  // f32 | bf16 | f16 [n, s, h, d]
  TensorView lses;  // f32 [n, s, h]
  TensorView out;   // like outs [s, h, d]
  TensorView lse;   // f32 [s, h]
  Launch launch;
};

// ---- cache and quantisation ---------------------------------------------------------------------

struct HadamardParams {
  static constexpr const char* kOp = "hadamard_transform";
  TensorView x;                 // f32 | bf16 | f16 [..., 2^m]
  std::optional<double> scale;  // of the result; none: 2^(-m / 2)
  TensorView out;               // like x
  Launch launch;
};

struct PerTokenCastParams {
  static constexpr const char* kOp = "per_token_cast_to_fp8";
  TensorView x;  // f32 | bf16 | f16 [..., n]
  bool use_ue8m0 = false;
  TensorView out;    // e4m3 [..., n]
  TensorView scale;  // f32 [..., ceil(n / 128)]
  Launch launch;
};

struct IndexerCacheWriteParams {
  static constexpr const char* kOp = "indexer_k_quant_and_cache";
  TensorView k;             // f32 | bf16 | f16 [T, D]
  TensorView kv_cache;      // u8 [pages, page_size, 1, D + 4]
  TensorView slot_mapping;  // i32 | i64 [T]
  bool use_ue8m0 = false;
  Launch launch;
};

struct IndexerCacheGatherParams {
  static constexpr const char* kOp = "gather_indexer_k_cache";
  TensorView kv_cache;     // u8 [pages, page_size, 1, D + 4]
  TensorView block_table;  // i32 [B, P]
  TensorView cu_seqlens;   // i32 [B + 1]
  TensorView k;            // e4m3 [num_tokens, D]
  TensorView k_scale;      // f32 [num_tokens]
  Launch launch;
};

struct MlaCacheWriteParams {
  static constexpr const char* kOp = "mla_kv_quant_and_cache";
  TensorView kv_c;      // bf16 | f16 [T, d_nope]
  TensorView k_pe;      // like kv_c [T, d_rope]
  TensorView kv_cache;  // u8 [pages, page_size, 1, 656 | 584], or like kv_c [.., d_nope + d_rope]
  TensorView slot_mapping;  // i32 | i64 [T]
  Launch launch;
};

struct MlaCacheGatherParams {
  static constexpr const char* kOp = "gather_mla_kv_cache";
  TensorView kv_cache;     // u8 [pages, page_size, 1, 656 | 584], or bf16 | f16 [.., d]
  TensorView block_table;  // i32 [B, P]
  TensorView cu_seqlens;   // i32 [B + 1]
  TensorView out;          // bf16 [num_tokens, 576 | 512], or like kv_cache [num_tokens, d]
  Launch launch;
};

}  // namespace dsa
