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

  // Of key bytes in L2 while a launch lasts: half of Hopper's 50 MB.
  constexpr std::int64_t kKeysAtOnce = (std::int64_t{24} << 20) / Config::kDim;
  static_assert(kKeysAtOnce % Config::kTileKeys == 0);
  const int num_sms = std::max(device_limits(p.launch.device).num_sms, 1);
  const std::int64_t blocks = ceil_div<std::int64_t>(task.rows_per_group, Config::kQueries);
  for (std::int64_t begin = 0; begin == 0 || begin < task.keys.num_keys; begin += kKeysAtOnce) {
    const bool is_last = begin + kKeysAtOnce >= task.keys.num_keys;
    const std::int64_t end = is_last ? task.keys.num_keys : begin + kKeysAtOnce;
    const sm90a::MqaLogitsRange keys{
        static_cast<std::uint32_t>(begin), static_cast<std::uint32_t>(end),
        static_cast<std::uint32_t>(is_last ? task.columns : std::min(end, task.columns))};
    const std::int64_t tiles = ceil_div<std::int64_t>(end - begin, Config::kTileKeys);
    const auto grid = static_cast<unsigned>(std::min<std::int64_t>(blocks * tiles, num_sms));
    const Status status = launch<sm90a::sm90a_mqa_logits_kernel<Config>>(
        "sm90a_mqa_logits", p.launch, dim3(grid), Config::kThreads,
        sizeof(typename Config::SharedStorage), task, keys, q_map, k_map);
    if (!status.ok()) return status;
  }
  return {};
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
