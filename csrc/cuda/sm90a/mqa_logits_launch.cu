// SPDX-License-Identifier: Apache-2.0
// fp8_mqa_logits and fp8_paged_mqa_logits on Hopper: params -> tensor maps, range, launch.
#include <bit>

#include "cuda/common/launch.h"
#include "cuda/common/make_mqa_task.h"
#include "cuda/common/tensor_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/mqa_logits_kernel.cuh"

namespace dsa::cuda {

namespace {

template <typename Config, typename Keys>
Status make_query_map(const MqaTask<Keys>& task, CUtensorMap& map) {
  const std::int64_t group_stride = task.num_groups > 1 ? task.q_strides[0] : task.q_strides[1];
  return make_tensor_map({task.q,
                          4,
                          {Config::kDim, task.num_heads, task.rows_per_group, task.num_groups},
                          {task.q_strides[2], task.q_strides[1], group_stride},
                          {Config::kDim, Config::kHeads, Config::kQueries, 1}},
                         map);
}

template <typename Config, typename Keys>
Status launch_range(const MqaTask<Keys>& task, sm90a::MqaLogitsRange range, const char* name,
                    const CUtensorMap& q_map, const CUtensorMap& k_map, const Launch& where) {
  const std::int64_t per_group = ceil_div<std::int64_t>(task.rows_per_group, Config::kQueries);
  range.rows_per_group = static_cast<std::int32_t>(task.rows_per_group);
  range.blocks_per_group = FastDivisor31(per_group);
  range.blocks = static_cast<std::uint32_t>(task.num_groups * per_group);
  std::int64_t work = ceil_div<std::int64_t>(range.end - range.begin, sm90a::kUnitKeys);
  if (task.clean) {
    work =
        std::max(work, ceil_div<std::int64_t>(range.columns_end - range.begin, sm90a::kCleanRun));
  }
  const int num_sms = std::max(device_limits(where.device).num_sms, 1);
  const auto grid = static_cast<unsigned>(
      std::clamp<std::int64_t>(std::int64_t{range.blocks} * work, 1, num_sms));
  range.ctas = FastDivisor31(grid);
  const std::int64_t units =
      std::int64_t{range.blocks} * ceil_div<std::int64_t>(range.end, sm90a::kUnitKeys);
  const bool may_have_tail =
      Config::kHasTail && units >= std::int64_t{grid} * sm90a::Tail<Config>::kLeastOfCta;
  range.counter = may_have_tail ? launch_counter(where) : kLaunchCounters;
  return launch<sm90a::sm90a_mqa_logits_kernel<Config, Keys>>(
      name, where, dim3(grid), Config::kThreads, sizeof(typename Config::SharedStorage), range,
      task, q_map, k_map);
}

template <typename Config>
Status launch_flat(const MqaLogitsParams& p) {
  const MqaTask<FlatKeys> task = make_task(p);
  if (task.rows_per_group == 0) return {};
  CUtensorMap q_map, k_map;
  if (Status status = make_query_map<Config>(task, q_map); !status.ok()) return status;
  const Status k_status = make_tensor_map({p.k.data,
                                           2,
                                           {p.k.size(1), p.k.size(0), 1},
                                           {p.k.stride(0), 0},
                                           {Config::kDim, Config::kTileKeys, 1}},
                                          k_map);
  if (!k_status.ok()) return k_status;

  // So many keys at a time as stay in L2 while all queries read them, half of Hopper's 50 MB, and
  // as make fewer than 2^31 units.
  constexpr std::int64_t kKeysOfL2 = (std::int64_t{24} << 20) / Config::kDim;
  static_assert(kKeysOfL2 % Config::kTileKeys == 0);
  constexpr std::int64_t kTileUnits = Config::kTileKeys / sm90a::kUnitKeys;
  const std::int64_t blocks = ceil_div<std::int64_t>(task.rows_per_group, Config::kQueries);
  const std::int64_t units_at_once = ((std::int64_t{1} << 31) - 1) / blocks - sm90a::kBlockUnits;
  const std::int64_t keys_at_once =
      std::min(kKeysOfL2, units_at_once / kTileUnits * Config::kTileKeys);
  for (std::int64_t begin = 0; begin < task.keys.num_keys; begin += keys_at_once) {
    const bool is_last = begin + keys_at_once >= task.keys.num_keys;
    const std::int64_t end = is_last ? task.keys.num_keys : begin + keys_at_once;
    sm90a::MqaLogitsRange range{};
    range.begin = static_cast<std::uint32_t>(begin);
    range.end = static_cast<std::uint32_t>(end);
    // None are left when rows are shorter than the keys, as windows' columns are.
    range.columns_end = static_cast<std::uint32_t>(
        std::max(is_last ? task.columns : std::min(end, task.columns), begin));
    const Status status =
        launch_range<Config>(task, range, "sm90a_mqa_logits", q_map, k_map, p.launch);
    if (!status.ok()) return status;
  }
  return {};
}

// Products of a query's head and a key below which fewer columns are faster (measured).
constexpr std::int64_t kFewProducts = std::int64_t{1} << 24;

template <int kHeads, int kDim>
Status launch_flat_heads(const MqaLogitsParams& p) {
  const bool are_few = p.q.size(0) * kHeads <= (kFewProducts - 1) / p.k.size(0);
  return are_few ? launch_flat<sm90a::FewFlatConfig<kHeads, kDim>>(p)
                 : launch_flat<sm90a::FlatConfig<kHeads, kDim>>(p);
}

template <int kDim>
Status launch_flat_dim(const MqaLogitsParams& p) {
  const std::int64_t heads = p.q.size(1);
  if (heads <= 16) return launch_flat_heads<16, kDim>(p);
  if (heads <= 32) return launch_flat_heads<32, kDim>(p);
  if (heads <= 64) return launch_flat_heads<64, kDim>(p);
  return launch_flat_heads<128, kDim>(p);
}

// Keys of a copy: a power of two that divides a page, from a swizzle's eight rows to 64.
std::int64_t box_keys(std::int64_t page_size) {
  return std::min<std::int64_t>(page_size & -page_size, 64);
}
constexpr std::int64_t kFewestBoxKeys = 8;

template <typename Config>
Status launch_paged(const PagedMqaLogitsParams& p) {
  const MqaTask<PagedKeys> task = make_task(p);
  if (task.num_groups == 0 || task.rows_per_group == 0 || task.columns == 0) return {};
  CUtensorMap q_map, k_map;
  if (Status status = make_query_map<Config>(task, q_map); !status.ok()) return status;
  const std::int64_t box = box_keys(p.kv_cache.size(1));
  const Status k_status = make_tensor_map({p.kv_cache.data,
                                           3,
                                           {Config::kDim, p.kv_cache.size(1), p.kv_cache.size(0)},
                                           {Config::kDim, p.kv_cache.stride(0)},
                                           {Config::kDim, static_cast<std::int32_t>(box), 1}},
                                          k_map);
  if (!k_status.ok()) return k_status;
  sm90a::MqaLogitsRange range{};
  range.end = static_cast<std::uint32_t>(task.keys.num_keys);
  range.columns_end = static_cast<std::uint32_t>(task.columns);
  range.box_keys_log2 = std::countr_zero(static_cast<std::uint64_t>(box));
  return launch_range<Config>(task, range, "sm90a_paged_mqa_logits", q_map, k_map, p.launch);
}

}  // namespace

Support sm90a_mqa_logits_takes(const MqaLogitsParams& p) {
  constexpr std::int64_t kMostQueries = std::int64_t{1} << 30;  // units of a tile of keys fit
  if (Support shapes = mqa_shapes(p); !shapes.ok()) return shapes;
  if (p.q.size(0) > kMostQueries) {
    return {"up to 1073741824 queries, not " + std::to_string(p.q.size(0))};
  }
  if (p.k.size(0) == 0) return {"at least one key"};
  if (!tensor_map_takes(p.k.data, p.k.stride(0))) return {"keys on 16 bytes, each its own"};
  if (!tensor_map_takes(p.q.data, p.q.stride(0)) || !tensor_map_takes(p.q.data, p.q.stride(1))) {
    return {"queries on 16 bytes, each its own"};
  }
  return {};
}

Status sm90a_mqa_logits(const MqaLogitsParams& p) {
  switch (p.q.size(2)) {
    case 32: return launch_flat_dim<32>(p);
    case 64: return launch_flat_dim<64>(p);
    default: return launch_flat_dim<128>(p);
  }
}

Support sm90a_paged_mqa_logits_takes(const PagedMqaLogitsParams& p) {
  if (Support shapes = mqa_shapes(p); !shapes.ok()) return shapes;
  if (p.q.size(3) != 128) return {"index_head_dim 128, not " + std::to_string(p.q.size(3))};
  if (p.kv_cache.size(1) % kFewestBoxKeys != 0 || p.kv_cache.size(0) == 0) {
    return {"pages of a multiple of 8 keys, not " + std::to_string(p.kv_cache.size(1))};
  }
  if (!tensor_map_takes(p.kv_cache.data, p.kv_cache.stride(0))) return {"pages on 16 bytes"};
  for (const int dim : {0, 1, 2}) {
    if (!tensor_map_takes(p.q.data, p.q.stride(dim))) return {"queries on 16 bytes, each its own"};
  }
  return {};
}

Status sm90a_paged_mqa_logits(const PagedMqaLogitsParams& p) {
  using sm90a::PagedConfig;
  const std::int64_t heads = p.q.size(2), next_n = p.q.size(1);
  if (heads <= 16) {
    return next_n <= 4 ? launch_paged<PagedConfig<16, 64, 1>>(p)
                       : launch_paged<PagedConfig<16, 64, 2>>(p);
  }
  if (heads <= 32) {
    if (next_n <= 2) return launch_paged<PagedConfig<32, 64, 1>>(p);
    return next_n <= 4 ? launch_paged<PagedConfig<32, 64, 2>>(p)
                       : launch_paged<PagedConfig<32, 128, 2>>(p);
  }
  if (heads <= 64) {
    if (next_n == 1) return launch_paged<PagedConfig<64, 64, 1>>(p);
    if (next_n == 2) return launch_paged<PagedConfig<64, 128, 1>>(p);
    return next_n <= 4 ? launch_paged<PagedConfig<64, 128, 2>>(p)
                       : launch_paged<PagedConfig<64, 128, 4>>(p);
  }
  if (next_n == 1) return launch_paged<PagedConfig<128, 128, 1>>(p);
  return next_n == 2 ? launch_paged<PagedConfig<128, 128, 2>>(p)
                     : launch_paged<PagedConfig<128, 128, 4>>(p);
}

}  // namespace dsa::cuda
