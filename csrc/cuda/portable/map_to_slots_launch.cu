// SPDX-License-Identifier: Apache-2.0
// map_to_slots. Tile: 4 indices of a row a thread; block table entries come through L1. No shared
// memory, no barriers.
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
constexpr int kIndices = kVectorBytes / static_cast<int>(sizeof(std::int32_t));

struct MapToSlots {
  TensorRows indices;
  TensorRows out;
  PageTable table;
  FastDivisor page_size;
  TensorView row_to_request;     // i32 [rows], optional
  FastDivisor rows_per_request;  // without it
  FastDivisor packs_per_row;
  bool aligned;
};

__global__ void __launch_bounds__(kThreads) portable_map_to_slots_kernel(MapToSlots map) {
  const std::int64_t pack_of_all = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t row = map.packs_per_row.quotient(pack_of_all);
  if (row >= map.indices.count()) return;
  const std::int64_t begin = (pack_of_all - row * map.packs_per_row.divisor()) * kIndices;
  const std::int64_t valid = map.indices.width() - begin;

  const std::int64_t request =
      map.row_to_request.defined()
          ? map.row_to_request.ptr<const std::int32_t>()[row * map.row_to_request.stride(0)]
          : map.rows_per_request.quotient(row);
  const PageTableRow pages = map.table.row(request);
  auto tokens = load<std::int32_t, kIndices>(map.indices.row<const std::int32_t>(row) + begin,
                                             valid, map.aligned);
#pragma unroll
  for (int i = 0; i < kIndices; ++i) {
    const std::int64_t token = tokens.values[i];
    const std::int64_t index = token < 0 ? -1 : map.page_size.quotient(token);
    const std::int64_t page = pages.page(index);
    const std::int64_t page_size = map.page_size.divisor();
    tokens.values[i] = page < 0 ? static_cast<std::int32_t>(kInvalidSlot)
                                : narrow_or_invalid(page * page_size + token - index * page_size);
  }
  store(map.out.row<std::int32_t>(row) + begin, tokens, valid, map.aligned);
}

}  // namespace

Status map_to_slots(const MapToSlotsParams& params) {
  const TensorRows indices(params.indices), out(params.out);
  const std::int64_t num_requests = params.block_table.size(0);
  const std::int64_t packs_per_row = ceil_div<std::int64_t>(indices.width(), kIndices);
  const std::int64_t ctas = ceil_div<std::int64_t>(indices.count() * packs_per_row, kThreads);
  if (ctas > kMaxGridX) return Status::internal("portable_map_to_slots_kernel: too many indices");
  const MapToSlots map{
      indices,
      out,
      {params.block_table, params.page_size},
      FastDivisor(params.page_size),
      params.row_to_request,
      FastDivisor(num_requests > 0 ? indices.count() / num_requests : 1),
      FastDivisor(packs_per_row),
      rows_aligned(params.indices, sizeof(std::int32_t), kVectorBytes) &&
          rows_aligned(params.out, sizeof(std::int32_t), kVectorBytes),
  };
  return launch<portable_map_to_slots_kernel>("portable_map_to_slots_kernel", params.launch,
                                              dim3(static_cast<unsigned>(ctas)), kThreads, 0, map);
}

}  // namespace dsa::cuda
