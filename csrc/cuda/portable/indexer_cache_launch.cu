// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/indexer_cache_kernel.cuh"

namespace dsa::cuda {
namespace {

// Keys as long as whole vectors, in pages that start at one.
bool keys_aligned(const TensorView& kv_cache) {
  const std::int64_t head_dim = kv_cache.size(3) - IndexerLayout::kScaleBytes;
  return head_dim % kVectorBytes == 0 && pages_aligned(kv_cache, 1, kVectorBytes);
}

}  // namespace

Status indexer_cache_write(const IndexerCacheWriteParams& params) {
  const TensorView& cache = params.kv_cache;
  static_assert(kMaxWrittenHeadDim == 128, "what validate lets through");
  return with_value_type(params.k.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t ctas = ceil_div<std::int64_t>(params.k.size(0), kWriteTokens);
    if (ctas > kMaxGridX) return Status::internal("portable_indexer_cache_write_kernel: too many");
    const IndexerWrite write{
        params.k,
        IndexerPages(cache),
        FastDivisor(cache.size(1)),
        cache.size(0) * cache.size(1),
        params.slot_mapping,
        params.use_ue8m0,
    };
    const bool whole = keys_aligned(cache) && rows_aligned(params.k, sizeof(T), kVectorBytes);
    return with_flag(whole, [&](auto flag) {
      return launch<portable_indexer_cache_write_kernel<T, decltype(flag)::value>>(
          "portable_indexer_cache_write_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
          kWriteThreads, 0, write);
    });
  });
}

Status indexer_cache_gather(const IndexerCacheGatherParams& params) {
  const std::int64_t ctas = ceil_div<std::int64_t>(params.k.size(0), kGatherRows);
  if (ctas > kMaxGridX) return Status::internal("portable_indexer_cache_gather_kernel: too many");
  const IndexerGather gather{
      IndexerPages(params.kv_cache),
      RaggedRows(params.cu_seqlens, params.block_table, params.kv_cache),
      params.k,
      params.k_scale,
  };
  const bool whole = keys_aligned(params.kv_cache) && rows_aligned(params.k, 1, kVectorBytes);
  return with_flag(whole, [&](auto flag) {
    return launch<portable_indexer_cache_gather_kernel<decltype(flag)::value>>(
        "portable_indexer_cache_gather_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
        kIndexerThreads, 0, gather);
  });
}

}  // namespace dsa::cuda
