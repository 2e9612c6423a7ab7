// SPDX-License-Identifier: Apache-2.0
// fp8_mqa_logits on Hopper: params -> tensor maps, schedule, launch.
#include "cuda/common/tensor_map.h"
#include "cuda/portable/mqa_logits_launch.cuh"
#include "cuda/sm90a/mqa_logits_kernel.cuh"

namespace dsa::cuda {

namespace {

template <typename Config>
Status launch_sm90a_mqa_logits(const MqaLogitsParams& p) {
  MqaTask<FlatKeys> task = make_task(p);
  const std::int64_t extent = std::max(task.columns, task.keys.num_keys);
  if (task.rows_per_group == 0) return {};
  CUtensorMap q_map, k_map;
  const Status q_status = make_tensor_map({p.q.data,
                                           3,
                                           {p.q.size(2), p.q.size(1), p.q.size(0)},
                                           {p.q.stride(1), p.q.stride(0)},
                                           {Config::kDim, Config::kHeads, Config::kQueries}},
                                          q_map);
  if (!q_status.ok()) return q_status;
  const Status k_status = make_tensor_map({p.k.data,
                                           2,
                                           {p.k.size(1), p.k.size(0), 1},
                                           {p.k.stride(0), 0},
                                           {Config::kDim, Config::kTileKeys, 1}},
                                          k_map);
  if (!k_status.ok()) return k_status;

  // Enough pairs that the last ones end together, each long enough to hide what it begins with.
  constexpr std::int64_t kPairsPerSm = 32;
  constexpr std::int64_t kFewestTiles = 8, kMostTiles = 64;
  const int num_sms = std::max(device_limits(p.launch.device).num_sms, 1);
  const std::int64_t blocks = ceil_div<std::int64_t>(task.rows_per_group, Config::kQueries);
  const std::int64_t tiles = ceil_div<std::int64_t>(extent, Config::kTileKeys);
  constexpr std::int64_t kMostPairs = std::int64_t{1} << 31;
  const std::int64_t chunk_tiles =
      std::max(std::clamp(blocks * tiles / (kPairsPerSm * num_sms), kFewestTiles, kMostTiles),
               ceil_div(tiles, kMostPairs / blocks));
  const std::int64_t pairs = blocks * ceil_div(tiles, chunk_tiles);
  const sm90a::MqaLogitsSchedule schedule{
      static_cast<std::uint32_t>(blocks), static_cast<std::uint32_t>(pairs),
      static_cast<std::uint32_t>(chunk_tiles * Config::kTileKeys)};
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(pairs, num_sms));
  return launch<sm90a::sm90a_mqa_logits_kernel<Config>>(
      "sm90a_mqa_logits", p.launch, dim3(grid), Config::kThreads,
      sizeof(typename Config::SharedStorage), task, schedule, q_map, k_map);
}

template <int kDim>
Status launch_sm90a_mqa_logits(const MqaLogitsParams& p) {
  const std::int64_t heads = p.q.size(1);
  if (heads <= 16) return launch_sm90a_mqa_logits<sm90a::MqaLogitsConfig<16, kDim>>(p);
  if (heads <= 32) return launch_sm90a_mqa_logits<sm90a::MqaLogitsConfig<32, kDim>>(p);
  if (heads <= 64) return launch_sm90a_mqa_logits<sm90a::MqaLogitsConfig<64, kDim>>(p);
  return launch_sm90a_mqa_logits<sm90a::MqaLogitsConfig<128, kDim>>(p);
}

}  // namespace

Support sm90a_mqa_logits_takes(const MqaLogitsParams& p) {
  if (Support shapes = mqa_shapes(p); !shapes.ok()) return shapes;
  if (p.k.size(0) == 0) return {"at least one key"};
  if (!tensor_map_takes(p.k.data, p.k.stride(0))) return {"keys on 16 bytes, each its own"};
  if (!tensor_map_takes(p.q.data, p.q.stride(0)) || !tensor_map_takes(p.q.data, p.q.stride(1))) {
    return {"queries on 16 bytes, each its own"};
  }
  return {};
}

Status sm90a_mqa_logits(const MqaLogitsParams& p) {
  switch (p.q.size(2)) {
    case 32: return launch_sm90a_mqa_logits<32>(p);
    case 64: return launch_sm90a_mqa_logits<64>(p);
    default: return launch_sm90a_mqa_logits<128>(p);
  }
}

}  // namespace dsa::cuda
