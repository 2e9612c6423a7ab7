// SPDX-License-Identifier: Apache-2.0
// map_to_slots. A warp takes kIndicesPerWarp indices of a row, kVectors vectors a lane, all of them
// in flight together; block table entries come through L1. No shared memory, no barriers.
#include <algorithm>
#include <cstdint>

#include "core/page_table.h"
#include "cuda/common/fast_divisor.h"
#include "cuda/common/launch.h"
#include "cuda/common/tensor_rows.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/cuda_kernels.h"

namespace dsa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(std::int32_t));
constexpr int kVectors = 4;
constexpr int kIndicesPerWarp = kVectors * kVector * kWarpSize;

struct MapToSlots {
  TensorRows indices;
  TensorRows out;
  PageTable table;
  FastDivisor31 page_size;       // 2^31 for any larger: the same slots fit into an int32
  TensorView row_to_request;     // i32 [rows], optional
  FastDivisor rows_per_request;  // without it
  FastDivisor warps_per_row;

  __device__ std::int64_t request(std::int64_t row) const {
    return row_to_request.defined()
               ? row_to_request.ptr<const std::int32_t>()[row * row_to_request.stride(0)]
               : rows_per_request.quotient(row);
  }
};

template <bool kWhole>
__global__ void __launch_bounds__(kThreads) portable_map_to_slots_kernel(MapToSlots map) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warp =
      std::int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t row = map.warps_per_row.quotient(warp);
  if (row >= map.indices.count()) return;
  const std::int64_t begin =
      (warp - row * map.warps_per_row.divisor()) * kIndicesPerWarp + lane * kVector;
  const std::int64_t valid = map.indices.width() - begin;
  constexpr int kStep = kVector * kWarpSize;

  const std::int32_t* indices = map.indices.row<const std::int32_t>(row) + begin;
  Pack<std::int32_t, kVector> tokens[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    tokens[i] = load<kWhole, std::int32_t, kVector>(indices + i * kStep, valid - i * kStep);
  }
  const PageTableRow pages = map.table.row(map.request(row));
  const auto num_entries = static_cast<std::uint32_t>(min(pages.width, std::int64_t{1} << 31));
  const auto page_size = static_cast<std::uint32_t>(map.page_size.divisor());
  std::int32_t* out = map.out.row<std::int32_t>(row) + begin;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (std::uint32_t& word : tokens[i].words) {
      const std::uint32_t token = word & 0x7FFF'FFFFu;
      const std::uint32_t index = map.page_size.quotient(token);
      const bool mapped = token == word && index < num_entries;  // word: not negative
      const std::int32_t page = mapped ? pages.entries[index] : -1;
      const std::uint64_t slot =
          std::uint64_t{static_cast<std::uint32_t>(page)} * page_size + (token - index * page_size);
      word = page >= 0 && slot >> 31 == 0 ? static_cast<std::uint32_t>(slot)
                                          : static_cast<std::uint32_t>(kInvalidSlot);
    }
    store<kWhole>(out + i * kStep, tokens[i], valid - i * kStep);
  }
}

}  // namespace

Status map_to_slots(const MapToSlotsParams& params) {
  const TensorRows indices(params.indices), out(params.out);
  const std::int64_t num_requests = params.block_table.size(0);
  const std::int64_t warps_per_row = ceil_div<std::int64_t>(indices.width(), kIndicesPerWarp);
  const std::int64_t ctas = ceil_div<std::int64_t>(indices.count() * warps_per_row, kWarps);
  if (ctas > kMaxGridX) return Status::internal("portable_map_to_slots_kernel: too many indices");
  const MapToSlots map{
      indices,
      out,
      {params.block_table, params.page_size},
      FastDivisor31(std::min(params.page_size, std::int64_t{1} << 31)),
      params.row_to_request,
      FastDivisor(num_requests > 0 ? indices.count() / num_requests : 1),
      FastDivisor(warps_per_row),
  };
  const bool whole = indices.width() % kVector == 0 &&
                     rows_aligned(params.indices, sizeof(std::int32_t), kVectorBytes) &&
                     rows_aligned(params.out, sizeof(std::int32_t), kVectorBytes);
  return with_flag(whole, [&](auto flag) {
    return launch<portable_map_to_slots_kernel<decltype(flag)::value>>(
        "portable_map_to_slots_kernel", params.launch, dim3(static_cast<unsigned>(ctas)), kThreads,
        0, map);
  });
}

}  // namespace dsa::cuda
