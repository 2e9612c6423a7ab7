// SPDX-License-Identifier: Apache-2.0
// The public C++ API: validate, choose a kernel, run it.
#include "dsa/api.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "dispatch/registry.h"
#include "dispatch/validate.h"

namespace dsa {

namespace {

bool is_known_kernel(std::string_view id) {
  for (const KernelInfo& info : list_kernels()) {
    if (info.id == id) return true;
  }
  return false;
}

template <typename Params>
Support supports(const Kernel<Params>& kernel, const Params& p, bool forced) {
  if (Support device = runs_on(kernel.target, p.launch.device); !device.ok()) return device;
  if (!forced && kernel.loses != nullptr && kernel.loses(p)) return {"slower here than another"};
  return kernel.supports(p);
}

// Of the ids in DSA_FORCE_KERNEL (comma-separated), the one that belongs to this op; empty if none
// does. An id of no kernel at all is an error: a misspelt one must not be ignored.
template <typename Params>
Status forced_kernel(std::string_view* forced) {
  const char* env = std::getenv("DSA_FORCE_KERNEL");
  if (env == nullptr) return {};
  for (std::string_view rest = env; !rest.empty();) {
    const std::string_view id = rest.substr(0, rest.find(','));
    rest.remove_prefix(id.size() < rest.size() ? id.size() + 1 : id.size());
    if (id.empty()) continue;
    if (!is_known_kernel(id)) {
      return Status::unsupported(
          "DSA_FORCE_KERNEL: expected kernel ids of this build "
          "(python -m dsa_ext lists them), got " +
          std::string(id));
    }
    for (const Kernel<Params>& kernel : kernels<Params>()) {
      if (id == kernel.id) *forced = kernel.id;
    }
  }
  return {};
}

// Runs the kernel with a workspace that is large enough: the caller's, or one of launch.allocate.
template <typename Params>
Status run(const Kernel<Params>& kernel, const Params& p) {
  const std::int64_t bytes = kernel.workspace_bytes != nullptr ? kernel.workspace_bytes(p) : 0;
  if constexpr (requires { p.workspace; }) {
    if (p.workspace.defined() && p.workspace.numel() < bytes) {
      return Status::invalid_argument(std::string(p.kOp) + ": workspace: expected at least " +
                                      std::to_string(bytes) + " bytes for this shape, got " +
                                      std::to_string(p.workspace.numel()));
    }
    if (bytes > 0 && !p.workspace.defined()) {
      Params with = p;
      if (p.launch.allocate != nullptr) {
        with.workspace.data = p.launch.allocate(bytes, p.launch.allocate_context);
      }
      if (with.workspace.data == nullptr) {
        return Status::invalid_argument(std::string(p.kOp) + ": workspace: expected " +
                                        std::to_string(bytes) + " bytes for this shape, got None");
      }
      with.workspace.dtype = DType::kUInt8;
      with.workspace.device = p.launch.device;
      with.workspace.ndim = 1;
      with.workspace.sizes[0] = bytes;
      with.workspace.strides[0] = 1;
      return kernel.run(with);
    }
  }
  return kernel.run(p);
}

template <typename Params>
Status dispatch(const Params& p) {
  if (Status status = validate(p); !status.ok()) return status;
  std::string_view forced;
  if (Status status = forced_kernel<Params>(&forced); !status.ok()) return status;

  std::string reasons;
  for (const Kernel<Params>& kernel : kernels<Params>()) {
    if (!forced.empty() && forced != kernel.id) continue;
    const Support support = supports(kernel, p, !forced.empty());
    if (!support.ok()) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(kernel.id) + ": " + support.reason;
      continue;
    }
    if (const char* log = std::getenv("DSA_LOG"); log != nullptr && std::strcmp(log, "1") == 0) {
      std::fprintf(stderr, "dsa_ext: %s -> %s\n", Params::kOp, kernel.id);
    }
    return run(kernel, p);
  }
  return Status::unsupported(std::string(Params::kOp) +
                             ": no kernel of this build takes these "
                             "arguments (" +
                             (forced.empty() ? "" : "DSA_FORCE_KERNEL is set; ") + reasons + ")");
}

}  // namespace

Status fp8_mqa_logits(const MqaLogitsParams& p) { return dispatch(p); }
Status fp8_paged_mqa_logits(const PagedMqaLogitsParams& p) { return dispatch(p); }
Status get_paged_mqa_logits_metadata(const PagedMqaLogitsMetadataParams& p) { return dispatch(p); }
Status fp8_mqa_topk(const MqaTopkParams& p) { return dispatch(p); }
Status fp8_paged_mqa_topk(const PagedMqaTopkParams& p) { return dispatch(p); }
Status topk_select(const TopkSelectParams& p) { return dispatch(p); }
Status map_to_slots(const MapToSlotsParams& p) { return dispatch(p); }
Status merge_topk(const MergeTopkParams& p) { return dispatch(p); }
Status flash_mla_sparse_fwd(const SparseFwdParams& p) { return dispatch(p); }
Status flash_mla_with_kvcache(const KvCacheFwdParams& p) { return dispatch(p); }
Status merge_attn_states(const MergeAttnStatesParams& p) { return dispatch(p); }
Status hadamard_transform(const HadamardParams& p) { return dispatch(p); }
Status per_token_cast_to_fp8(const PerTokenCastParams& p) { return dispatch(p); }
Status indexer_k_quant_and_cache(const IndexerCacheWriteParams& p) { return dispatch(p); }
Status gather_indexer_k_cache(const IndexerCacheGatherParams& p) { return dispatch(p); }
Status mla_kv_quant_and_cache(const MlaCacheWriteParams& p) { return dispatch(p); }
Status gather_mla_kv_cache(const MlaCacheGatherParams& p) { return dispatch(p); }

}  // namespace dsa
