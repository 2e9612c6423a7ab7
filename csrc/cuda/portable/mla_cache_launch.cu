// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/mla_cache_kernel.cuh"

namespace dsa::cuda {
namespace {

// Whether every token of the cache starts at a vector; both FP8 formats keep that of their pages.
bool tokens_aligned(const TensorView& kv_cache) {
  static_assert(MlaV32Layout::kTokenBytes % kVectorBytes == 0);
  static_assert(MlaV32Layout::kRopeOffset % kVectorBytes == 0);
  static_assert(MlaV4Layout::kDataBytes % kVectorBytes == 0);
  static_assert(MlaV4Layout::kDimNope % kVectorBytes == 0);
  static_assert(MlaV4Layout::kScaleBytes % 8 == 0 && MlaV32Layout::kScaleOffset % 16 == 0);
  return kv_cache.dtype == DType::kUInt8 ? pages_aligned(kv_cache, 1, kVectorBytes)
                                         : rows_aligned(kv_cache, 2, kVectorBytes);
}

// Rows of 16-bit values that are whole vectors.
bool vectors_only(const TensorView& t) {
  return t.size(-1) % kUnit == 0 && rows_aligned(t, 2, kVectorBytes);
}

// body(Format{}) with the format of an FP8 cache.
template <typename Body>
Status with_fp8_format(const TensorView& kv_cache, Body&& body) {
  if (kv_cache.size(3) == MlaV32Layout::kTokenBytes) return body(MlaV32Format{});
  return body(MlaV4Format{});
}

}  // namespace

Status mla_cache_write(const MlaCacheWriteParams& params) {
  const TensorView& cache = params.kv_cache;
  const std::int64_t ctas = ceil_div<std::int64_t>(params.kv_c.size(0), kMlaTokens);
  if (ctas > kMaxGridX) return Status::internal("portable_mla_cache_write_kernel: too many tokens");
  const dim3 grid(static_cast<unsigned>(ctas));
  const MlaWrite write{params.kv_c, params.k_pe, cache, params.slot_mapping,
                       FastDivisor(cache.size(1))};
  const bool whole =
      vectors_only(params.kv_c) && vectors_only(params.k_pe) && tokens_aligned(cache);
  return with_flag(whole, [&](auto flag) {
    constexpr bool kWhole = decltype(flag)::value;
    if (cache.dtype != DType::kUInt8) {
      return launch<portable_mla_cache_write_16bit_kernel<kWhole>>(
          "portable_mla_cache_write_16bit_kernel", params.launch, grid, kMlaThreads, 0, write);
    }
    return with_fp8_format(cache, [&](auto format) {
      using Format = decltype(format);
      constexpr const char* kName = "portable_mla_cache_write_kernel";
      const auto layout = Format::layout(cache.size(1));
      if (params.kv_c.dtype == DType::kFloat16) {
        return launch<portable_mla_cache_write_kernel<__half, Format, kWhole>>(
            kName, params.launch, grid, kMlaThreads, 0, write, layout);
      }
      return launch<portable_mla_cache_write_kernel<__nv_bfloat16, Format, kWhole>>(
          kName, params.launch, grid, kMlaThreads, 0, write, layout);
    });
  });
}

Status mla_cache_gather(const MlaCacheGatherParams& params) {
  const TensorView& cache = params.kv_cache;
  const std::int64_t ctas = ceil_div<std::int64_t>(params.out.size(0), kMlaTokens);
  if (ctas > kMaxGridX) return Status::internal("portable_mla_cache_gather_kernel: too many rows");
  const dim3 grid(static_cast<unsigned>(ctas));
  const MlaGather gather{cache, RaggedRows(params.cu_seqlens, params.block_table, cache),
                         params.out};
  return with_flag(vectors_only(params.out) && tokens_aligned(cache), [&](auto flag) {
    constexpr bool kWhole = decltype(flag)::value;
    if (cache.dtype != DType::kUInt8) {
      return launch<portable_mla_cache_gather_16bit_kernel<kWhole>>(
          "portable_mla_cache_gather_16bit_kernel", params.launch, grid, kMlaThreads, 0, gather);
    }
    return with_fp8_format(cache, [&](auto format) {
      using Format = decltype(format);
      return launch<portable_mla_cache_gather_kernel<Format, kWhole>>(
          "portable_mla_cache_gather_kernel", params.launch, grid, kMlaThreads, 0, gather,
          Format::layout(cache.size(1)));
    });
  });
}

}  // namespace dsa::cuda
