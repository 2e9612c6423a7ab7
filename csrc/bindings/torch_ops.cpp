// SPDX-License-Identifier: Apache-2.0
// torch.ops.dsa_ext.*: torch tensors -> params (csrc/include/dsa/params.h), through LibTorch's
// stable ABI alone, so that one build runs with every torch from TORCH_TARGET_VERSION on.
//
// Every op writes into tensors the caller gives and returns nothing: the Python front end
// allocates. One function serves CPU and CUDA; dispatch (csrc/dispatch) tells them apart by the
// params' device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "dsa/api.h"
#include "dsa/parallel.h"

// Weak: a CPU-only torch does not have it, and must be able to load this library.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

dsa::DType to_dtype(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return dsa::DType::kFloat32;
    case ScalarType::BFloat16: return dsa::DType::kBFloat16;
    case ScalarType::Half: return dsa::DType::kFloat16;
    case ScalarType::Float8_e4m3fn: return dsa::DType::kFloat8E4M3;
    case ScalarType::Byte: return dsa::DType::kUInt8;
    case ScalarType::Char: return dsa::DType::kInt8;
    case ScalarType::Int: return dsa::DType::kInt32;
    case ScalarType::Long: return dsa::DType::kInt64;
    case ScalarType::Double: return dsa::DType::kFloat64;
    case ScalarType::Float8_e4m3fnuz: return dsa::DType::kFloat8E4M3Fnuz;
    case ScalarType::Float8_e5m2: return dsa::DType::kFloat8E5M2;
    case ScalarType::Float8_e8m0fnu: return dsa::DType::kFloat8E8M0;
    case ScalarType::Float4_e2m1fn_x2: return dsa::DType::kFloat4E2M1;
    case ScalarType::Short: return dsa::DType::kInt16;
    case ScalarType::UInt16: return dsa::DType::kUInt16;
    case ScalarType::UInt32: return dsa::DType::kUInt32;
    case ScalarType::UInt64: return dsa::DType::kUInt64;
    case ScalarType::Bool: return dsa::DType::kBool;
    default: return dsa::DType::kOther;
  }
}

dsa::Device to_device(const Tensor& t) {
  const auto device = t.device();
  const auto index = static_cast<std::int32_t>(device.is_cpu() ? 0 : device.index());
  if (device.is_cpu()) return {dsa::DeviceType::kCpu, index};
  if (device.is_cuda()) return {dsa::DeviceType::kCuda, index};
  return {dsa::DeviceType::kOther, index};
}

// None in a tensor's place comes as an undefined tensor: validate names the argument.
dsa::TensorView view(const Tensor& t) {
  dsa::TensorView v;
  if (!t.defined()) return v;
  v.data = t.data_ptr();
  v.dtype = to_dtype(t.scalar_type());
  v.device = to_device(t);
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  v.ndim = static_cast<std::int32_t>(sizes.size());
  for (std::int32_t i = 0; i < std::min(v.ndim, dsa::kMaxDims); ++i) {
    v.sizes[i] = sizes[i];
    v.strides[i] = strides[i];
  }
  return v;
}

dsa::TensorView view(const OptTensor& t) { return t.has_value() ? view(*t) : dsa::TensorView{}; }

void raise_if_failed(const dsa::Status& status) {
  if (status.ok()) return;
  if (status.code() == dsa::StatusCode::kInvalidArgument) {
    throw std::invalid_argument(status.message());
  }
  throw std::runtime_error(status.message());
}

// A kernel's workspace, from torch's allocator: stream-ordered, so that it may be dropped as soon
// as the kernels are launched.
struct Workspace {
  const Tensor& anchor;
  OptTensor bytes;

  static void* allocate(std::int64_t size, void* context) {
    auto& self = *static_cast<Workspace*>(context);
    self.bytes = torch::stable::new_empty(self.anchor, {size}, torch::headeronly::ScalarType::Byte);
    return self.bytes->data_ptr();
  }
};

// Runs an op where its tensors live: on their device, on torch's current stream.
template <typename Params>
void call(dsa::Status (*op)(const Params&), Params& params, const Tensor& anchor) {
  if (anchor.defined()) params.launch.device = to_device(anchor);
  if (params.launch.device.type != dsa::DeviceType::kCuda) return raise_if_failed(op(params));
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("dsa_ext: this torch has no CUDA support");
  }
  const torch::stable::accelerator::DeviceGuard guard(params.launch.device.index);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(params.launch.device.index, &params.launch.stream));
  Workspace workspace{anchor, std::nullopt};
  params.launch.allocate = Workspace::allocate;
  params.launch.allocate_context = &workspace;
  raise_if_failed(op(params));
}

void fp8_mqa_logits(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor k_start,
                    Tensor k_end, bool clean_logits, std::int64_t max_seqlen_k, Tensor out) {
  dsa::MqaLogitsParams p;
  p.q = view(q);
  p.k = view(k);
  p.k_scale = view(k_scale);
  p.weights = view(weights);
  p.k_start = view(k_start);
  p.k_end = view(k_end);
  p.clean_logits = clean_logits;
  p.max_seqlen_k = max_seqlen_k;
  p.out = view(out);
  call(dsa::fp8_mqa_logits, p, q);
}

void fp8_paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens,
                          Tensor block_table, OptTensor schedule_meta, std::int64_t max_context_len,
                          bool clean_logits, OptTensor indices, Tensor out) {
  dsa::PagedMqaLogitsParams p;
  p.q = view(q);
  p.kv_cache = view(kv_cache);
  p.weights = view(weights);
  p.context_lens = view(context_lens);
  p.block_table = view(block_table);
  p.schedule_meta = view(schedule_meta);
  p.max_context_len = max_context_len;
  p.clean_logits = clean_logits;
  p.indices = view(indices);
  p.out = view(out);
  call(dsa::fp8_paged_mqa_logits, p, q);
}

void get_paged_mqa_logits_metadata(Tensor context_lens, std::int64_t block_kv, std::int64_t num_sms,
                                   OptTensor indices, Tensor out) {
  dsa::PagedMqaLogitsMetadataParams p;
  p.context_lens = view(context_lens);
  p.block_kv = block_kv;
  p.num_sms = num_sms;
  p.indices = view(indices);
  p.out = view(out);
  call(dsa::get_paged_mqa_logits_metadata, p, context_lens);
}

void fp8_mqa_topk(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor k_start, Tensor k_end,
                  std::int64_t topk, Tensor indices, OptTensor scores, OptTensor workspace) {
  dsa::MqaTopkParams p;
  p.q = view(q);
  p.k = view(k);
  p.k_scale = view(k_scale);
  p.weights = view(weights);
  p.k_start = view(k_start);
  p.k_end = view(k_end);
  p.topk = topk;
  p.indices = view(indices);
  p.scores = view(scores);
  p.workspace = view(workspace);
  call(dsa::fp8_mqa_topk, p, q);
}

void fp8_paged_mqa_topk(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens,
                        Tensor block_table, OptTensor schedule_meta, std::int64_t max_context_len,
                        std::int64_t topk, bool return_slots, Tensor indices, OptTensor scores,
                        OptTensor workspace) {
  dsa::PagedMqaTopkParams p;
  p.q = view(q);
  p.kv_cache = view(kv_cache);
  p.weights = view(weights);
  p.context_lens = view(context_lens);
  p.block_table = view(block_table);
  p.schedule_meta = view(schedule_meta);
  p.max_context_len = max_context_len;
  p.topk = topk;
  p.return_slots = return_slots;
  p.indices = view(indices);
  p.scores = view(scores);
  p.workspace = view(workspace);
  call(dsa::fp8_paged_mqa_topk, p, q);
}

void topk_select(Tensor scores, std::int64_t topk, OptTensor row_starts, OptTensor row_ends,
                 OptTensor index_base, std::int64_t index_base_scalar, OptTensor block_table,
                 std::int64_t page_size, OptTensor row_to_request, Tensor indices,
                 OptTensor out_scores, OptTensor workspace) {
  dsa::TopkSelectParams p;
  p.scores = view(scores);
  p.topk = topk;
  p.row_starts = view(row_starts);
  p.row_ends = view(row_ends);
  p.index_base = view(index_base);
  p.index_base_scalar = index_base_scalar;
  p.block_table = view(block_table);
  p.page_size = page_size;
  p.row_to_request = view(row_to_request);
  p.indices = view(indices);
  p.out_scores = view(out_scores);
  p.workspace = view(workspace);
  call(dsa::topk_select, p, scores);
}

void map_to_slots(Tensor indices, Tensor block_table, std::int64_t page_size,
                  OptTensor row_to_request, Tensor out) {
  dsa::MapToSlotsParams p;
  p.indices = view(indices);
  p.block_table = view(block_table);
  p.page_size = page_size;
  p.row_to_request = view(row_to_request);
  p.out = view(out);
  call(dsa::map_to_slots, p, indices);
}

void merge_topk(Tensor scores, Tensor indices, std::int64_t topk, Tensor out_indices,
                OptTensor out_scores) {
  dsa::MergeTopkParams p;
  p.scores = view(scores);
  p.indices = view(indices);
  p.topk = topk;
  p.out_indices = view(out_indices);
  p.out_scores = view(out_scores);
  call(dsa::merge_topk, p, scores);
}

void flash_mla_sparse_fwd(Tensor q, Tensor kv, Tensor indices, double sm_scale, std::int64_t d_v,
                          OptTensor attn_sink, OptTensor topk_length, bool batch_invariant,
                          Tensor out, Tensor max_logits, Tensor lse, OptTensor workspace) {
  dsa::SparseFwdParams p;
  p.q = view(q);
  p.kv = view(kv);
  p.indices = view(indices);
  p.sm_scale = sm_scale;
  p.d_v = d_v;
  p.attn_sink = view(attn_sink);
  p.topk_length = view(topk_length);
  p.batch_invariant = batch_invariant;
  p.out = view(out);
  p.max_logits = view(max_logits);
  p.lse = view(lse);
  p.workspace = view(workspace);
  call(dsa::flash_mla_sparse_fwd, p, q);
}

void flash_mla_with_kvcache(Tensor q, Tensor k_cache, OptTensor block_table,
                            OptTensor cache_seqlens, std::int64_t head_dim_v, double softmax_scale,
                            bool causal, bool is_fp8_kvcache, OptTensor indices,
                            OptTensor attn_sink, OptTensor extra_k_cache, OptTensor extra_indices,
                            OptTensor topk_length, OptTensor extra_topk_length,
                            bool batch_invariant, Tensor out, Tensor lse, OptTensor workspace) {
  dsa::KvCacheFwdParams p;
  p.q = view(q);
  p.k_cache = view(k_cache);
  p.block_table = view(block_table);
  p.cache_seqlens = view(cache_seqlens);
  p.head_dim_v = head_dim_v;
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  // FlashMLA's default has been False and True: bytes are FP8 under both.
  p.is_fp8_kvcache = is_fp8_kvcache || dsa::is_8_bit(p.k_cache.dtype);
  p.indices = view(indices);
  p.attn_sink = view(attn_sink);
  p.extra_k_cache = view(extra_k_cache);
  p.extra_indices = view(extra_indices);
  p.topk_length = view(topk_length);
  p.extra_topk_length = view(extra_topk_length);
  p.batch_invariant = batch_invariant;
  p.out = view(out);
  p.lse = view(lse);
  p.workspace = view(workspace);
  call(dsa::flash_mla_with_kvcache, p, q);
}

void merge_attn_states(Tensor outs, Tensor lses, Tensor out, Tensor lse) {
  dsa::MergeAttnStatesParams p;
  p.outs = view(outs);
  p.lses = view(lses);
  p.out = view(out);
  p.lse = view(lse);
  call(dsa::merge_attn_states, p, outs);
}

void hadamard_transform(Tensor x, std::optional<double> scale, Tensor out) {
  dsa::HadamardParams p;
  p.x = view(x);
  p.scale = scale;
  p.out = view(out);
  call(dsa::hadamard_transform, p, x);
}

void per_token_cast_to_fp8(Tensor x, bool use_ue8m0, Tensor out, Tensor scale) {
  dsa::PerTokenCastParams p;
  p.x = view(x);
  p.use_ue8m0 = use_ue8m0;
  p.out = view(out);
  p.scale = view(scale);
  call(dsa::per_token_cast_to_fp8, p, x);
}

void indexer_k_quant_and_cache(Tensor k, Tensor kv_cache, Tensor slot_mapping, bool use_ue8m0) {
  dsa::IndexerCacheWriteParams p;
  p.k = view(k);
  p.kv_cache = view(kv_cache);
  p.slot_mapping = view(slot_mapping);
  p.use_ue8m0 = use_ue8m0;
  call(dsa::indexer_k_quant_and_cache, p, k);
}

void gather_indexer_k_cache(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, Tensor k,
                            Tensor k_scale) {
  dsa::IndexerCacheGatherParams p;
  p.kv_cache = view(kv_cache);
  p.block_table = view(block_table);
  p.cu_seqlens = view(cu_seqlens);
  p.k = view(k);
  p.k_scale = view(k_scale);
  call(dsa::gather_indexer_k_cache, p, kv_cache);
}

void mla_kv_quant_and_cache(Tensor kv_c, Tensor k_pe, Tensor kv_cache, Tensor slot_mapping) {
  dsa::MlaCacheWriteParams p;
  p.kv_c = view(kv_c);
  p.k_pe = view(k_pe);
  p.kv_cache = view(kv_cache);
  p.slot_mapping = view(slot_mapping);
  call(dsa::mla_kv_quant_and_cache, p, kv_c);
}

void gather_mla_kv_cache(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, Tensor out) {
  dsa::MlaCacheGatherParams p;
  p.kv_cache = view(kv_cache);
  p.block_table = view(block_table);
  p.cu_seqlens = view(cu_seqlens);
  p.out = view(out);
  call(dsa::gather_mla_kv_cache, p, kv_cache);
}

// The CPU backend's loops run on torch's own threads: torch.set_num_threads holds.
void run_on_torch_threads(std::int64_t begin, std::int64_t end, std::int64_t grain,
                          dsa::RangeBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

const bool kTorchThreadsInstalled = (dsa::set_parallel_for(run_on_torch_threads), true);

}  // namespace

STABLE_TORCH_LIBRARY(dsa_ext, m) {
  m.def(
      "fp8_mqa_logits(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor k_start, "
      "Tensor k_end, bool clean_logits, int max_seqlen_k, Tensor(a!) out) -> ()");
  m.def(
      "fp8_paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, Tensor? schedule_meta, int max_context_len, bool clean_logits, "
      "Tensor? indices, Tensor(a!) out) -> ()");
  m.def(
      "get_paged_mqa_logits_metadata(Tensor context_lens, int block_kv, int num_sms, "
      "Tensor? indices, Tensor(a!) out) -> ()");
  m.def(
      "fp8_mqa_topk(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor k_start, "
      "Tensor k_end, int topk, Tensor(a!) indices, Tensor(b!)? scores, Tensor(c!)? workspace) -> "
      "()");
  m.def(
      "fp8_paged_mqa_topk(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, Tensor? schedule_meta, int max_context_len, int topk, "
      "bool return_slots, Tensor(a!) indices, Tensor(b!)? scores, Tensor(c!)? workspace) -> ()");
  m.def(
      "topk_select(Tensor scores, int topk, Tensor? row_starts, Tensor? row_ends, "
      "Tensor? index_base, int index_base_scalar, Tensor? block_table, int page_size, "
      "Tensor? row_to_request, Tensor(a!) indices, Tensor(b!)? out_scores, "
      "Tensor(c!)? workspace) -> ()");
  m.def(
      "map_to_slots(Tensor indices, Tensor block_table, int page_size, Tensor? row_to_request, "
      "Tensor(a!) out) -> ()");
  m.def(
      "merge_topk(Tensor scores, Tensor indices, int topk, Tensor(a!) out_indices, "
      "Tensor(b!)? out_scores) -> ()");
  m.def(
      "flash_mla_sparse_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v, "
      "Tensor? attn_sink, Tensor? topk_length, bool batch_invariant, Tensor(a!) out, "
      "Tensor(b!) max_logits, Tensor(c!) lse, Tensor(d!)? workspace) -> ()");
  m.def(
      "flash_mla_with_kvcache(Tensor q, Tensor k_cache, Tensor? block_table, "
      "Tensor? cache_seqlens, int head_dim_v, float softmax_scale, bool causal, "
      "bool is_fp8_kvcache, Tensor? indices, Tensor? attn_sink, Tensor? extra_k_cache, "
      "Tensor? extra_indices, Tensor? topk_length, Tensor? extra_topk_length, "
      "bool batch_invariant, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? workspace) -> ()");
  m.def("merge_attn_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("hadamard_transform(Tensor x, float? scale, Tensor(a!) out) -> ()");
  m.def("per_token_cast_to_fp8(Tensor x, bool use_ue8m0, Tensor(a!) out, Tensor(b!) scale) -> ()");
  m.def(
      "indexer_k_quant_and_cache(Tensor k, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "bool use_ue8m0) -> ()");
  m.def(
      "gather_indexer_k_cache(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, "
      "Tensor(a!) k, Tensor(b!) k_scale) -> ()");
  m.def(
      "mla_kv_quant_and_cache(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, "
      "Tensor slot_mapping) -> ()");
  m.def(
      "gather_mla_kv_cache(Tensor kv_cache, Tensor block_table, Tensor cu_seqlens, "
      "Tensor(a!) out) -> ()");
}

#define DSA_IMPL_ALL(m)                                                               \
  m.impl("fp8_mqa_logits", TORCH_BOX(&fp8_mqa_logits));                               \
  m.impl("fp8_paged_mqa_logits", TORCH_BOX(&fp8_paged_mqa_logits));                   \
  m.impl("get_paged_mqa_logits_metadata", TORCH_BOX(&get_paged_mqa_logits_metadata)); \
  m.impl("fp8_mqa_topk", TORCH_BOX(&fp8_mqa_topk));                                   \
  m.impl("fp8_paged_mqa_topk", TORCH_BOX(&fp8_paged_mqa_topk));                       \
  m.impl("topk_select", TORCH_BOX(&topk_select));                                     \
  m.impl("map_to_slots", TORCH_BOX(&map_to_slots));                                   \
  m.impl("merge_topk", TORCH_BOX(&merge_topk));                                       \
  m.impl("flash_mla_sparse_fwd", TORCH_BOX(&flash_mla_sparse_fwd));                   \
  m.impl("flash_mla_with_kvcache", TORCH_BOX(&flash_mla_with_kvcache));               \
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));                         \
  m.impl("hadamard_transform", TORCH_BOX(&hadamard_transform));                       \
  m.impl("per_token_cast_to_fp8", TORCH_BOX(&per_token_cast_to_fp8));                 \
  m.impl("indexer_k_quant_and_cache", TORCH_BOX(&indexer_k_quant_and_cache));         \
  m.impl("gather_indexer_k_cache", TORCH_BOX(&gather_indexer_k_cache));               \
  m.impl("mla_kv_quant_and_cache", TORCH_BOX(&mla_kv_quant_and_cache));               \
  m.impl("gather_mla_kv_cache", TORCH_BOX(&gather_mla_kv_cache))

STABLE_TORCH_LIBRARY_IMPL(dsa_ext, CPU, m) { DSA_IMPL_ALL(m); }
STABLE_TORCH_LIBRARY_IMPL(dsa_ext, CUDA, m) { DSA_IMPL_ALL(m); }
