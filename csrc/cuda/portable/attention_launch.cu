// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd and flash_mla_with_kvcache on the portable attention kernel: the choice of
// an instance.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/attention_config.cuh"
#include "cuda/portable/attention_kernel.cuh"
#include "cuda/portable/code_arch.h"

namespace dsa::cuda {

namespace {

struct Instance {
  LatentFormat format;
  int heads, tokens, ctas_per_sm;
  std::size_t shared_bytes;
  Status (*launch)(const AttentionArgs&, std::int64_t, const Launch&);
};

template <typename Config>
Status launch_attention(const AttentionArgs& args, std::int64_t rows, const Launch& where) {
  const std::int64_t head_tiles = ceil_div(args.num_heads, Config::kHeads);
  const dim3 grid(static_cast<unsigned>(rows * head_tiles), static_cast<unsigned>(args.num_splits));
  return launch<portable_attention_kernel<Config>>("portable_attention_kernel", where, grid,
                                                   Config::kThreads,
                                                   sizeof(typename Config::SharedStorage), args);
}

template <LatentFormat kFormat, int kHeads, int kTokens>
constexpr Instance instance() {
  using Config = AttentionConfig<kFormat, kHeads, kTokens>;
  return {kFormat,
          kHeads,
          kTokens,
          Config::kCtasPerSm,
          sizeof(typename Config::SharedStorage),
          launch_attention<Config>};
}

// The closed list: what is compiled, what is chosen from. Heads a tile, keys a tile. 64 heads need
// SM90's shared memory; 16 fit the 99 KiB of SM86, SM89 and SM12x.
constexpr Instance kInstances[] = {
    instance<LatentFormat::kBf16, 16, 32>(),   instance<LatentFormat::kBf16, 32, 32>(),
    instance<LatentFormat::kBf16, 64, 64>(),   instance<LatentFormat::kF16, 16, 32>(),
    instance<LatentFormat::kF16, 32, 32>(),    instance<LatentFormat::kF16, 64, 64>(),
    instance<LatentFormat::kMlaV32, 16, 32>(), instance<LatentFormat::kMlaV32, 32, 32>(),
    instance<LatentFormat::kMlaV32, 64, 64>(), instance<LatentFormat::kMlaV4, 16, 32>(),
    instance<LatentFormat::kMlaV4, 32, 32>(),  instance<LatentFormat::kMlaV4, 64, 64>(),
};

// Of a CTA, on the device and in the code that it runs: what was compiled for an older architecture
// leaves out the tiles that do not fit there.
std::size_t shared_bytes_of(const Device& device) {
  const std::size_t most = device_limits(device).shared_bytes_per_cta;
  const int code = code_arch(device);
  return code == 0 ? most : std::min(most, most_shared_bytes(code));
}

// Of those that fit, the smallest that has all heads in one tile, else the largest.
// nullptr: none fits.
const Instance* choose_instance(LatentFormat format, int num_heads, std::size_t shared_bytes) {
  const Instance* best = nullptr;
  for (const Instance& i : kInstances) {
    if (i.format != format || i.shared_bytes > shared_bytes) continue;
    if (best == nullptr || (best->heads < num_heads && i.heads > best->heads)) best = &i;
  }
  return best;
}

Support takes(LatentFormat format, std::int64_t rows, std::int64_t heads, std::int64_t keys,
              const Launch& launch) {
  constexpr std::int64_t kFewestHeads = 16;  // a tile
  const Support sizes = attention_sizes(rows, heads, keys, kFewestHeads);
  if (!sizes.ok()) return sizes;
  if (choose_instance(format, 1, shared_bytes_of(launch.device)) == nullptr) {
    return {"more shared memory than this device has"};
  }
  return {};
}

// ---- splits ---------------------------------------------------------------------------------

const Instance& instance_of(const KvCacheFwdParams& p) {
  return *choose_instance(format_of(p.k_cache), static_cast<int>(p.q.size(2)),
                          shared_bytes_of(p.launch.device));
}

SplitPlan plan_of(const KvCacheFwdParams& p) {
  const Instance& instance = instance_of(p);
  constexpr std::size_t kReserved = 1024;  // of an SM's shared memory, for each CTA
  const std::size_t most = device_limits(p.launch.device).shared_bytes_per_cta;
  const auto fit = static_cast<int>((most + kReserved) / (instance.shared_bytes + kReserved));
  return plan_splits(p, {instance.heads, instance.tokens, std::min(fit, instance.ctas_per_sm)});
}

}  // namespace

// ---- flash_mla_sparse_fwd ---------------------------------------------------------------------

Support sparse_fwd_takes(const SparseFwdParams& p) {
  if (p.is_fp8() && p.q.dtype != DType::kBFloat16) return {"a bfloat16 q with an 8-bit kv"};
  const Support dims = p.is_fp8() ? Support{} : mla_dims(p.q.size(2), p.d_v);
  return dims.ok() ? takes(format_of(p.kv), p.q.size(0), p.q.size(1), p.indices.size(2), p.launch)
                   : dims;
}

Status sparse_fwd(const SparseFwdParams& p) {
  const AttentionArgs a = make_attention_args(p);
  const Instance* instance =
      choose_instance(format_of(p.kv), a.num_heads, shared_bytes_of(p.launch.device));
  return instance->launch(a, p.q.size(0), p.launch);
}

// ---- flash_mla_with_kvcache -------------------------------------------------------------------

Support kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (p.is_fp8_kvcache && p.q.dtype != DType::kBFloat16) {
    return {"a bfloat16 q with an 8-bit cache"};
  }
  if (!p.is_fp8_kvcache) {
    const Support dims = mla_dims(p.q.size(3), p.head_dim_v);
    if (!dims.ok()) return dims;
  }
  return takes(format_of(p.k_cache), p.q.size(0) * p.q.size(1), p.q.size(2), keys_of(p), p.launch);
}

std::int64_t kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_of(p).workspace_bytes(p);
}

Status kvcache_fwd(const KvCacheFwdParams& p) {
  return run_splits(p, plan_of(p), instance_of(p).launch);
}

}  // namespace dsa::cuda
